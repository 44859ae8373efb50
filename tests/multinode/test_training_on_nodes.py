"""Training over nodes gives the losses of one node, whatever starts the ranks and moves the gradients."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from launching import mpirun, torchrun

from cluster import Cluster
from ddp.job import Job
from ddp.telemetry.recording import open_recording, read_parts
from mpi_environments import mpi_environment
from ranks import RankPool
from training_runs import job, losses_of, train_ranks

PROGRAM = str(Path(__file__).with_name("train_jobs.py"))
STEPS = 5
Losses = list[float]


def regression(folder: Path, name: str, transport: str) -> Job:
    """19 examples a step over four ranks: shares of five and four."""
    return job(
        folder,
        run__id=name,
        run__steps=STEPS,
        task__name="multinode.wide_regression:Task",
        global_batch_size=19,
        micro_batch_size=3,
        transport__name=transport,
    )


def written(folder: Path, transport: str) -> str:
    """The path of a regression's job file, whose run is called like its transport."""
    path = folder / f"{transport}.toml"
    path.write_text(regression(folder, transport, transport).to_toml())
    return str(path)


@pytest.fixture(scope="module")
def on_one_node(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The regression's losses of four ranks on this machine, over c10d."""
    folder = tmp_path_factory.mktemp("one-node")
    ended = train_ranks(rank_pool, 4, regression(folder, "run", "c10d"))
    assert [each.message for each in ended] == [""] * 4
    return losses_of(folder / "run")


def assert_same(run_directory: Path, expected: Losses, transport: str) -> None:
    """The run averaged by `transport` and has the losses expected."""
    with contextlib.closing(open_recording(run_directory / "run.db")) as database:
        assert [part.transport for part in read_parts(database)] == [transport]
    found = losses_of(run_directory)
    assert len(found) == STEPS
    assert found[0] > found[-1], "nothing was learned"
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_torchrun_on_two_nodes(two_nodes: Cluster, on_one_node: Losses, tmp_path: Path) -> None:
    arguments = ["-m", "ddp", "train", written(tmp_path, "auto"), "--allow-import", "multinode.wide_regression"]
    ended = torchrun(two_nodes, 2, arguments, tmp_path)
    assert [each.code for each in ended] == [0, 0], ended
    assert_same(tmp_path / "auto", on_one_node, "hierarchical")


def test_torchrun_on_four_nodes(may_have_nodes: None, on_one_node: Losses, tmp_path: Path) -> None:
    with Cluster(nodes=4) as cluster:
        ended = torchrun(
            cluster,
            1,
            ["-m", "ddp", "train", written(tmp_path, "auto"), "--allow-import", "multinode.wide_regression"],
            tmp_path,
        )
    assert [each.code for each in ended] == [0] * 4, ended
    assert_same(tmp_path / "auto", on_one_node, "c10d")  # a rank a node: nothing to reduce inside


def test_open_mpi_on_two_nodes(two_nodes: Cluster, on_one_node: Losses, tmp_path: Path) -> None:
    chosen = {"auto": "hierarchical", "mpi": "mpi", "c10d": "c10d"}
    arguments = [PROGRAM, *(written(tmp_path, transport) for transport in chosen)]
    ended = mpirun(two_nodes, mpi_environment("openmpi"), 2, arguments, tmp_path)
    assert ended.code == 0, ended
    for name, transport in chosen.items():
        assert_same(tmp_path / name, on_one_node, transport)


def test_mpich_on_two_nodes(two_nodes: Cluster, on_one_node: Losses, tmp_path: Path) -> None:
    arguments = ["-m", "ddp", "train", written(tmp_path, "auto"), "--allow-import", "multinode.wide_regression"]
    ended = mpirun(two_nodes, mpi_environment("mpich"), 2, arguments, tmp_path)
    assert ended.code == 0, ended
    assert_same(tmp_path / "auto", on_one_node, "hierarchical")
