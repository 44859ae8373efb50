from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ddp.errors import DdpError
from ddp.process_group import initialise, interface_towards, is_peer_gone, meet, routed_address, shutdown
from ddp.topology import SINGLE_PROCESS, Topology
from jobs import beside_python, python, run_command
from launch.submit import free_port
from mpi_environments import MpiEnvironment
from ranks import RankPool, run_ranks

MPIRUN = [beside_python("mpirun"), "-n"]


def sum_alone(rank: int, world_size: int, store_address: str) -> float:
    initialise(SINGLE_PROCESS, "cpu", 10)
    tensor = torch.full((3,), 2.5)
    dist.all_reduce(tensor)
    shutdown()
    assert not dist.is_initialized()
    assert not meet(0.1)  # there is no MPI here
    return tensor.sum().item()


def test_one_process_has_a_group_too(rank_pool: RankPool) -> None:
    assert rank_pool.run(1, sum_alone) == [7.5]


def sum_of_ranks(rank: int, world_size: int, store_address: str, launcher: str, timeout: float) -> float | str:
    here = Topology(rank, world_size, rank, world_size, launcher=launcher)  # type: ignore[arg-type]
    try:
        initialise(here, "cpu", timeout)
    except DdpError as error:
        return f"{type(error).__name__}: {error}"
    tensor = torch.tensor([10.0 + rank])
    dist.all_reduce(tensor)
    shutdown()
    return tensor.item()


def test_ranks_meet_at_the_masters_port() -> None:
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    assert run_ranks(3, sum_of_ranks, "slurm", 30.0, environment=master) == [33.0] * 3


def test_srun_without_a_master_says_what_to_export() -> None:
    nothing = {"MASTER_ADDR": "", "MASTER_PORT": ""}
    (said, _) = run_ranks(2, sum_of_ranks, "slurm", 30.0, environment=nothing)
    assert said.startswith("UsageError: MASTER_ADDR and MASTER_PORT not set: export")


def missing_peer(rank: int, world_size: int, store_address: str) -> float | str:
    return sum_of_ranks(0, 2, store_address, "slurm", 1.0)


def test_a_rank_that_never_comes_is_a_lost_peer() -> None:
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (said,) = run_ranks(1, missing_peer, environment=master)
    assert isinstance(said, str)
    assert said.startswith("PeerLostError: the process group of 2 ranks cannot be set up")


def one_leaves(rank: int, world_size: int, store_address: str) -> bool:
    initialise(Topology(rank, 2, rank, 2, launcher="slurm"), "cpu", 30)
    if rank == 1:
        dist.destroy_process_group()
        return True
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return is_peer_gone(error)
    return False


def test_glooos_way_of_saying_that_a_peer_is_gone_is_known() -> None:
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    assert run_ranks(2, one_leaves, environment=master) == [True, True]
    assert not is_peer_gone(ValueError("Connection closed by peer"))
    assert not is_peer_gone(RuntimeError("shapes differ"))


MPI_SUM = """
import os, sys
from ddp.topology import from_environment
here = from_environment(os.environ)
from ddp.process_group import initialise, meet, shutdown
store = initialise(here, "cpu", 30).underlying_store
import torch, torch.distributed as dist
tensor = torch.tensor([10.0 + here.rank])
dist.all_reduce(tensor)
assert meet(30)
listening = [line.split()[1] for line in open("/proc/net/tcp").read().splitlines()[1:] if line.split()[3] == "0A"]
address = f"{store.port:04X}"
ports = [a for a in listening if a.endswith(address)]
print(f'rank {here.rank} {tensor.item()} {os.environ["GLOO_SOCKET_IFNAME"]} {ports}\\n', end="", flush=True)  # in one piece
shutdown()
"""


def test_under_mpirun_the_store_is_rank_0s_and_on_loopback_only(mpi: MpiEnvironment, tmp_path: Path) -> None:
    ended = run_command(mpi.command(3, "-c", MPI_SUM), tmp_path, mpi.variables)
    assert ended.code == 0, ended
    lines = sorted(line for line in ended.stdout.splitlines() if line.startswith("rank"))
    assert [line.rpartition(":")[0] for line in lines] == [f"rank {rank} 33.0 lo ['0100007F" for rank in range(3)]


MPI_ABORT = """
import os, sys, time
from ddp.topology import from_environment
here = from_environment(os.environ)
from ddp.process_group import abort, initialise, meet
initialise(here, "cpu", 30)
if here.rank == 1:
    assert not meet(0.2)
    abort(7)
time.sleep(600)
"""


def test_abort_ends_all_ranks_with_its_code(mpi: MpiEnvironment, tmp_path: Path) -> None:
    assert run_command(mpi.command(2, "-c", MPI_ABORT), tmp_path, mpi.variables).code == 7


def test_mpirun_without_mpi4py_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['mpi4py'] = None\n" + MPI_SUM.replace(
        'store = initialise(here, "cpu", 30).underlying_store',
        'from ddp.errors import UsageError\ntry: initialise(here, "cpu", 30)\nexcept UsageError as e: print(e); sys.exit()',
    )
    ended = run_command([*MPIRUN, "2", *python("-c", program)], tmp_path)
    assert ended.code == 0, ended
    assert ended.stdout.count("pip install -e '.[mpi]'") == 2


def test_an_mpi_of_its_own_in_each_process_is_refused(tmp_path: Path) -> None:
    """As with an mpirun of another MPI than mpi4py's: each rank would be a world of one."""
    alone = """
import os
from ddp.topology import Topology
from ddp.errors import UsageError
from ddp.process_group import initialise
try: initialise(Topology(0, 2, 0, 2, launcher="pmi"), "cpu", 10)
except UsageError as error: print(error)
"""
    ended = run_command(python("-c", alone), tmp_path)
    assert "mpirun started 2 ranks, but mpi4py sees 1" in ended.stdout, ended


def test_the_interface_of_a_route() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


def test_loopback_and_own_addresses_lead_to_no_other_node() -> None:
    assert routed_address(["127.0.0.1", "127.0.1.1"], []) is None
    assert routed_address(["172.17.0.1"], ["172.17.0.1"]) is None


def test_an_interface_the_user_chose_stays(rank_pool: RankPool) -> None:
    assert rank_pool.run(1, interface_after) == ["lo"]


def interface_after(rank: int, world_size: int, store_address: str) -> str:
    sum_alone(rank, world_size, store_address)  # the pool sets it
    return os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_has_both_backends() -> None:
    assert run_ranks(1, backends) == ["cpu:gloo,cuda:nccl"]


def backends(rank: int, world_size: int, store_address: str) -> str:
    initialise(SINGLE_PROCESS, "cuda", 30)
    return dist.get_backend_config()
