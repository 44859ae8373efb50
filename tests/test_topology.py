from __future__ import annotations

from dataclasses import replace

import pytest

from ddp.errors import TopologyError
from ddp.topology import SINGLE_PROCESS, Topology, from_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "2",
    "LOCAL_WORLD_SIZE": "3",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "4",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "5", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "7",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),2",
    "SLURM_NODEID": "3",
    "SLURM_RESTART_COUNT": "2",
}


def test_no_launcher_is_one_process() -> None:
    assert from_environment({"PATH": "/bin", "MASTER_ADDR": "left-by-a-batch-script"}) == SINGLE_PROCESS


def test_torchrun() -> None:
    assert from_environment(TORCHRUN) == Topology(5, 6, 2, 3, node=1, launcher="torchrun", restarts=4)


def test_open_mpi_on_one_node() -> None:
    here = from_environment(OPEN_MPI)
    assert here == Topology(1, 3, 1, 3, node=0, launcher="openmpi")
    assert here.one_node
    assert here.under_mpi


def test_mpich_on_several_nodes_has_no_node_number() -> None:
    here = from_environment(PMI)
    assert here == Topology(3, 5, 0, 2, node=None, launcher="pmi")
    assert not here.one_node


def test_slurm_step() -> None:
    assert from_environment(SLURM) == Topology(7, 8, 1, 2, node=3, launcher="slurm", restarts=2)


def test_slurm_nodes_of_different_sizes() -> None:
    uneven = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2),3", "SLURM_LOCALID": "2"}
    assert from_environment(uneven).local_world_size == 3
    assert from_environment(uneven | {"SLURM_NODEID": "1", "SLURM_LOCALID": "0"}).local_world_size == 1


def test_a_plain_process_in_a_batch_script_is_one_process() -> None:
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert from_environment(batch) == replace(SINGLE_PROCESS, restarts=2)


def test_all_who_start_a_run_again_are_counted() -> None:
    around = {"SLURM_RESTART_COUNT": "2", "DDP_RESTART_COUNT": "1"}
    assert from_environment(TORCHRUN | around).restarts == 7
    assert from_environment(OPEN_MPI | around).restarts == 3


def test_slurms_own_pmi_is_slurm() -> None:
    assert from_environment(SLURM | {"PMI_RANK": "7", "PMI_SIZE": "8"}).launcher == "slurm"


@pytest.mark.parametrize(
    "variables, launcher",
    [
        (SLURM | PMI | OPEN_MPI | TORCHRUN, "torchrun"),
        (SLURM | PMI | OPEN_MPI, "openmpi"),
        (SLURM | PMI, "pmi"),
        # mpirun in a batch job: every rank sees SLURM_PROCID=0, which contradicts nothing
        (SLURM | OPEN_MPI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "openmpi"),
    ],
)
def test_the_first_family_wins_and_is_judged_alone(variables: dict[str, str], launcher: str) -> None:
    assert from_environment(variables).launcher == launcher


@pytest.mark.parametrize("family", [TORCHRUN, OPEN_MPI, PMI], ids=["torchrun", "openmpi", "pmi"])
def test_a_missing_variable_is_named(family: dict[str, str]) -> None:
    optional = {"GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"}
    for name in family.keys() - optional:
        partial = {key: value for key, value in family.items() if key != name}
        with pytest.raises(TopologyError, match=f"not {name}:"):
            from_environment(partial)


def test_a_missing_slurm_variable_is_named() -> None:
    with pytest.raises(TopologyError, match="SLURM_STEP_ID.* not SLURM_STEP_NUM_TASKS:"):
        from_environment({key: value for key, value in SLURM.items() if key != "SLURM_STEP_NUM_TASKS"})


@pytest.mark.parametrize(
    "variables, named",
    [
        (TORCHRUN | {"RANK": "6"}, ["RANK=6", "WORLD_SIZE=6"]),
        (TORCHRUN | {"LOCAL_RANK": "3"}, ["LOCAL_RANK=3", "LOCAL_WORLD_SIZE=3"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "7"}, ["LOCAL_WORLD_SIZE=7", "WORLD_SIZE=6"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "6"}, ["LOCAL_RANK=2", "RANK=5"]),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "3"}, ["OMPI_COMM_WORLD_RANK=3", "OMPI_COMM_WORLD_SIZE=3"]),
        (PMI | {"PMI_SIZE": "1"}, ["PMI_RANK=3", "PMI_SIZE=1"]),
        (SLURM | {"SLURM_NODEID": "4"}, ["SLURM_NODEID=4", "SLURM_STEP_TASKS_PER_NODE=2(x3),2"]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE=two"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1"]),
        (TORCHRUN | {"WORLD_SIZE": "six"}, ["WORLD_SIZE=six"]),
        (TORCHRUN | {"RANK": ""}, ["RANK="]),
    ],
)
def test_a_contradiction_names_both_variables(variables: dict[str, str], named: list[str]) -> None:
    with pytest.raises(TopologyError) as caught:
        from_environment(variables)
    assert all(name in str(caught.value) for name in named), str(caught.value)


def test_open_mpi_may_number_a_nodes_ranks_in_another_order() -> None:
    assert from_environment(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}).local_rank == 0
