"""Ranks that die, stop or hang in a phase given by name, under every launcher: who is named, and how the run goes on."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ddp import checkpoint, outcome
from ddp.board import DIED, FAILED, LEFT, PAGE_BYTES, PhaseBoard, Position
from ddp.outcome import OUTCOME_FILE_VARIABLE, Outcome
from jobs import Ended, finish, python, run_command, started, wait_until
from launch import deaths
from losing import write_losing_job
from mpi_environments import MpiEnvironment, mpi_environment

TRAIN = ("-m", "ddp", "train", "job.toml", "--allow-import", "losing")
STANDALONE = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SURVIVE_SECONDS = 30.0


def launched(launcher: str, ranks: int, *options: str, interpreter: str | None = None) -> list[str]:
    argv = python(
        "-m", "launch", launcher, "job.toml", "--nproc-per-node", str(ranks), "--allow-import", "losing", *options
    )
    return [interpreter or argv[0], *argv[1:]]


def lose(folder: Path, argv: list[str]) -> tuple[Ended, float]:
    """Run to the end; also how long it went on after the rank acted."""
    ended = run_command(argv, folder)
    return ended, time.time() - (folder / "acted").stat().st_mtime


def written(folder: Path) -> Outcome:
    ended = outcome.read(folder / "runs" / "run" / "outcome.json")
    assert ended is not None
    return ended


@pytest.mark.parametrize(
    "launcher, ranks, transport, phase, step, rank",
    [
        ("torchrun", 3, "c10d", "all-reduce", 3, 1),
        ("torchrun", 2, "hierarchical", "optimizer", 2, 0),
        ("mpirun", 2, "mpi", "backward", 3, 1),
        ("mpirun", 3, "c10d", "evaluation", 4, 0),
        ("mpirun", 2, "shared_memory", "save", 2, 0),
    ],
)
def test_a_rank_that_dies_is_named_with_its_phase_and_signal(
    tmp_path: Path, launcher: str, ranks: int, transport: str, phase: str, step: int, rank: int
) -> None:
    write_losing_job(tmp_path, phase, step, rank=rank, transport=transport)
    ended, seconds = lose(tmp_path, launched(launcher, ranks))
    assert ended.code == 1, ended
    pid = (tmp_path / "acted").read_text()
    where = f"in {phase} {'after' if phase in ('save', 'evaluation') else 'of'} step {step}"
    last = ended.stderr.strip().splitlines()[-1]
    assert f"rank {rank} (pid {pid}, host " in last and last.endswith(f"died {where}, by SIGKILL"), ended.stderr
    assert ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr
    assert written(tmp_path).lost_rank == rank
    assert written(tmp_path).cause.endswith(f"died {where}")
    assert seconds < SURVIVE_SECONDS


def test_bare_torchrun_names_it_too(tmp_path: Path) -> None:
    write_losing_job(tmp_path, "evaluation", 4)
    ended, _ = lose(tmp_path, [*STANDALONE, "2", *TRAIN])
    assert ended.stderr.count("error: rank 0 on ") == 1, ended.stderr
    assert "died in evaluation after step 4\n" in ended.stderr
    assert "stopped by" not in ended.stderr  # torchrun sends the survivors SIGTERM


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_rank_that_dies_before_training(tmp_path: Path, launcher: str) -> None:
    write_losing_job(tmp_path, "set-up")
    ended, _ = lose(tmp_path, launched(launcher, 2))
    assert ended.code == 1, ended
    last = ended.stderr.strip().splitlines()[-1]
    assert "rank 1 (pid " in last and "died" in last and "in set-up" in last and "by SIGKILL" in last, ended.stderr


def test_mpich_leaves_no_rank_to_speak_and_launch_speaks(tmp_path: Path) -> None:
    mpich = mpi_environment("mpich")
    write_losing_job(tmp_path, "optimizer", rank=2)
    ended, _ = lose(tmp_path, launched("mpirun", 3, interpreter=mpich.python))
    assert ended.code == 1, ended
    last = ended.stderr.strip().splitlines()[-1]
    assert "rank 2 (pid " in last and "in optimizer of step 3" in last and "SIGKILL" in last, ended.stderr


@pytest.mark.parametrize("transport, ranks", [("c10d", 3)])
def test_a_rank_that_is_stopped_is_named_within_the_deadline(tmp_path: Path, transport: str, ranks: int) -> None:
    write_losing_job(tmp_path, "forward", 3, action="stop", transport=transport, timeout_seconds=4)
    ended, seconds = lose(tmp_path, launched("torchrun", ranks))
    assert ended.code == 1, ended
    last = ended.stderr.strip().splitlines()[-1]
    assert "rank 1 (pid " in last and "is stopped (by SIGSTOP, or a debugger) in forward of step 3" in last, (
        ended.stderr
    )
    assert written(tmp_path).lost_rank == 1
    assert seconds < SURVIVE_SECONDS


@pytest.mark.parametrize("transport, phase, step", [("c10d", "evaluation", 4)])
def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits(
    tmp_path: Path, transport: str, phase: str, step: int
) -> None:
    write_losing_job(tmp_path, phase, step, action="hang", transport=transport, timeout_seconds=4)
    ended, _ = lose(tmp_path, launched("mpirun", 3))
    assert ended.code == 1, ended
    assert written(tmp_path).lost_rank == 1, written(tmp_path)
    assert f"does not answer, and was last seen in {phase}" in ended.stderr, ended.stderr


def test_an_error_of_its_own_is_the_one_to_show(tmp_path: Path) -> None:
    write_losing_job(tmp_path, "evaluation", 4, action="raise", rank=0)
    ended, _ = lose(tmp_path, launched("mpirun", 3))
    assert ended.stderr.strip().splitlines()[-1].endswith("ValueError: this is the cause"), ended.stderr
    assert written(tmp_path).lost_rank is None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's, of the one run there is."""
    (run,) = (each for each in (folder / "runs").iterdir() if each.name != "targets")
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name.startswith("step-00000006")
    found: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        shared, own = checkpoint.load(newest, rank)
        _collect({"shared": shared, "own": own}, str(rank), found)
    return found


def _collect(value: object, name: str, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        into[name] = value
    elif isinstance(value, dict):
        for key, each in value.items():
            _collect(each, f"{name}.{key}", into)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_losing_job(folder, "none", action="none")
    assert run_command(launched("torchrun", 2), folder).code == 0
    return weights(folder)


@pytest.mark.parametrize(
    "argv, phase, step",
    [
        (
            python("-m", "torch.distributed.run", "--master-port={port}", "--max-restarts=2", "--nproc-per-node=2")
            + list(TRAIN),
            "evaluation",
            4,
        ),
        (launched("mpirun", 2, "--max-restarts", "1"), "save", 4),
    ],
    ids=["static", "launch mpirun"],
)
def test_a_run_without_an_id_goes_on_and_ends_as_if_nothing_had_been(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], argv: list[str], phase: str, step: int
) -> None:
    from launch.submit import free_port

    write_losing_job(tmp_path, phase, step, run_id=None)
    ended, _ = lose(tmp_path, [each.format(port=free_port()) for each in argv])
    assert ended.code == 0, ended
    ours = weights(tmp_path)
    assert ours.keys() == undisturbed.keys() and ours
    assert all(torch.equal(each, undisturbed[name]) for name, each in ours.items())
    (written_at_the_end,) = (tmp_path / "runs").glob("*/outcome.json")
    assert '"code": 0' in written_at_the_end.read_text()


def test_a_stop_is_no_reason_to_start_again(mpi: MpiEnvironment, tmp_path: Path) -> None:
    write_losing_job(tmp_path, "none", action="none", steps=100_000)
    argv = launched("mpirun", 2, "--max-restarts", "3", interpreter=mpi.python)
    with started(argv, tmp_path) as process:
        wait_until(lambda: list((tmp_path / "runs").glob("run/checkpoints/step-*")))
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # under nohup
        process.send_signal(signal.SIGTERM if is_ignored else signal.SIGHUP)
        ended = finish(process)
    assert ended.code == 75, ended
    assert "starting the ranks again" not in ended.stderr


def test_a_board_is_what_it_was_when_its_owner_is_gone(tmp_path: Path) -> None:
    board = PhaseBoard.make(0)
    peer = PhaseBoard(board.descriptor)
    board.enter("forward", 7)
    assert str(peer.position) == "in forward of step 7"
    assert board.interrupt("all-reduce") == "forward"
    assert peer.position == Position("all-reduce", 7)
    assert peer.ended == 0 and peer.lost is None and not peer.is_at_roll_call
    board.come_to_roll_call()
    board.note_lost(3, DIED)
    board.end(LEFT)
    assert (peer.ended, peer.lost, peer.is_at_roll_call) == (LEFT, (3, DIED), True)
    assert str(Position("evaluation", 0)) == "in evaluation"
    assert str(Position("end", 9)) == "at the end after step 9"
    assert FAILED != LEFT
    board.settled()


def test_without_room_for_the_page_a_rank_does_without_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, length)

    monkeypatch.setenv(OUTCOME_FILE_VARIABLE, str(tmp_path / "outcome.json"))
    PhaseBoard.make(0).settled()
    assert (tmp_path / "outcome.json.rank.0").stat().st_blocks > 0
    monkeypatch.setattr(os, "posix_fallocate", full)
    board = PhaseBoard.make(0)
    board.enter("forward", 2)
    assert board.position == Position("forward", 2) and list(tmp_path.iterdir()) == []
    board.settled()


def test_a_page_that_is_not_written_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a hole on a full disk, which is a SIGBUS to whoever looks."""
    mapped: list[int] = []

    def noting(descriptor: int) -> PhaseBoard:
        mapped.append(descriptor)
        return PhaseBoard(descriptor)

    monkeypatch.setattr(deaths, "PhaseBoard", noting)
    page = tmp_path / "outcome.json.rank.0"
    page.touch()
    os.truncate(page, PAGE_BYTES)
    watch = deaths.DeathWatch(tmp_path / "outcome.json")
    watch._look()
    assert mapped == []
    monkeypatch.setenv(OUTCOME_FILE_VARIABLE, str(tmp_path / "outcome.json"))
    PhaseBoard.make(0).settled()
    with watch:
        wait_until(lambda: mapped, 10)
