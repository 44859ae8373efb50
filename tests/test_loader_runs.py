"""Whole runs with workers: what they are like, and how they end; on several ranks and under launchers."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from ddp.job import Job
from jobs import finish, is_running, python, started, wait_until, write_job
from launch.submit import descendants
from mpi_environments import MpiEnvironment
from ranks import RankPool
from training_runs import (
    Ended,
    Misbehaving,
    differences,
    job,
    losses_of,
    saved,
    train_one,
    train_ranks,
)


class Spied(Misbehaving):
    """Workers note what they hold open; the `at`-th fetch of rank `rank`'s workers does `what`."""

    def __init__(self, folder: str, what: str = "none", rank: int = -1) -> None:
        super().__init__()
        self.folder, self.what, self.chosen, self.fetched = Path(folder), what, dist.get_rank() == rank, 0
        self.rank_process = os.getpid()

    def act(self, indices: Sequence[int]) -> None:
        if os.getpid() == self.rank_process:
            return
        self.fetched += 1
        (self.folder / f"{os.getpid()}.txt").write_text("\n".join(held_open()))
        if self.chosen and self.fetched == 3:
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "raise":
                raise ValueError("this is the cause")


def held_open() -> list[str]:
    """What this process has open: files by name, and ports that it listens on."""
    held: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as each:
                    if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        held.append(f"listens on {each.getsockname()[1]}")
        except OSError:
            continue
        held.append(target)
    return held


def train_and_count(
    rank: int, world_size: int, store_address: str, jobs: Sequence[Job], resume: str | None
) -> tuple[Ended, int]:
    """`train_one`, and how many child processes there are afterwards."""
    return train_one(rank, world_size, store_address, jobs, resume), len(multiprocessing.active_children())


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_without_augmentation_is_the_same_with_workers(
    rank_pool: RankPool, tmp_path: Path, world_size: int
) -> None:
    """One rank takes each third step in halves. Workers hold nothing open that is the rank's, and none is left."""
    task = {
        "task__name": "test_loader_runs:Spied",
        "task__options": {"folder": str(tmp_path)},
        "metrics__enabled": True,
    }
    task |= {"evaluation__every_steps": 4, "micro_batch_size": 12 if world_size == 1 else 2}
    train_ranks(rank_pool, world_size, job(tmp_path / "none", **task))
    with_workers = job(tmp_path / "two", data__workers=2, **task)
    ended = rank_pool.run(world_size, train_and_count, [with_workers] * world_size, None)
    assert [(one.kind, one.threads, children) for one, children in ended] == [("", 0, 0)] * world_size, ended
    none, two = tmp_path / "none" / "run", tmp_path / "two" / "run"
    assert losses_of(two) == losses_of(none)
    assert differences(saved(two, 20, world_size), saved(none, 20, world_size)) == []
    notes = [note.read_text() for note in tmp_path.glob("*.txt")]
    assert len(notes) == 2 * world_size
    (port,) = re.findall(r"http://127.0.0.1:(\d+)/metrics", ended[0][0].printed)
    assert not any(str(tmp_path) in note or f"listens on {port}" in note for note in notes)
    assert not any(is_running(int(note.stem)) for note in tmp_path.glob("*.txt"))


@pytest.mark.parametrize(
    ("what", "said"),
    [("die", "of rank 1 was killed by SIGKILL"), ("raise", "of rank 1 raised ValueError: this is the")],
)
def test_a_worker_that_fails_ends_all_ranks(rank_pool: RankPool, tmp_path: Path, what: str, said: str) -> None:
    options = {"folder": str(tmp_path), "what": what, "rank": 1}
    failing = job(tmp_path, task__name="test_loader_runs:Spied", task__options=options, data__workers=2)
    ended = rank_pool.run(3, train_and_count, [failing] * 3, None, timeout=40)
    assert [one.kind for one, _ in ended] == ["PeerLostError", "LoaderError", "PeerLostError"], ended
    assert said in ended[1][0].message and "worker " in ended[1][0].message
    assert all("rank 1" in ended[rank][0].message for rank in (0, 2)), ended
    assert [children for _, children in ended] == [0, 0, 0]
    assert not any(is_running(int(note.stem)) for note in tmp_path.glob("*.txt"))


def stopped_by_a_signal(argv: Sequence[str], folder: Path, number: signal.Signals) -> None:
    """Exit 75 with a checkpoint, and no worker is left."""
    write_job(folder, "wait", steps=200)
    with (folder / "job.toml").open("a") as file:
        file.write("\n[data]\nworkers = 2\n")
    with started(argv, folder) as process:
        wait_until(lambda: (folder / "waiting-0").exists() and (folder / "waiting-1").exists())
        below = descendants(process.pid)
        workers = [each for each in below if data_worker(each, below)]
        assert len(workers) == 4, below
        os.kill(workers[0], number)  # as a launcher that signals a whole group
        process.send_signal(number)
        ended = finish(process)
    assert ended.code == 75, ended
    assert ended.stderr.count("stopped by") == 1, ended.stderr
    assert not any(map(is_running, workers))
    assert list((folder / "runs" / "run" / "checkpoints").iterdir())


def data_worker(process_id: int, among: Sequence[int]) -> bool:
    """Whether its parent runs the very same command."""
    command, parent = (Path(f"/proc/{process_id}/cmdline").read_bytes(), parent_of(process_id))
    return parent in among and Path(f"/proc/{parent}/cmdline").read_bytes() == command


def parent_of(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_signal_under_torchrun(tmp_path: Path) -> None:
    argv = python("-m", "launch", "torchrun", "job.toml", "--nproc-per-node", "2", "--allow-import", "misbehaving")
    stopped_by_a_signal(argv, tmp_path, signal.SIGTERM)


def test_a_signal_under_mpirun(tmp_path: Path, mpi: MpiEnvironment) -> None:
    argv = [mpi.python, "-m", "launch", "mpirun", "job.toml", "--nproc-per-node", "2", "--allow-import", "misbehaving"]
    stopped_by_a_signal(argv, tmp_path, signal.SIGUSR1)
