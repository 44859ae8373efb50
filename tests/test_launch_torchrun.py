from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ddp import outcome
from jobs import finish, python, run_command, started, wait_until, write_job
from launch import torchrun

LAUNCH = python("-m", "launch", "torchrun", "job.toml", "--nproc-per-node", "2", "--allow-import", "misbehaving")


def test_render() -> None:
    argv = torchrun.render(["-m", "ddp", "train", "my job.toml"], ranks=3, port=12345, interpreter="/opt/python")
    assert argv == [
        "/opt/python",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=3",
        "--master-addr=127.0.0.1",
        "--master-port=12345",
        "--no-python",
        "/opt/python",
        "-m",
        "ddp",
        "train",
        "my job.toml",
    ]


def test_a_users_number_of_threads_stays() -> None:
    assert torchrun.environment({"OMP_NUM_THREADS": "4"}) == {}
    assert torchrun.environment({}) == {"OMP_NUM_THREADS": "1"}


def test_a_rank_that_raises_is_shown_once_and_torchrun_says_nothing(tmp_path: Path) -> None:
    write_job(tmp_path, "raise", rank=1)
    ended = run_command(LAUNCH, tmp_path)
    assert ended.code == 1, ended
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 on ")
    assert last.endswith("step 1: ValueError: this is the cause")
    assert "torch/distributed/" not in ended.stderr
    written = outcome.read(tmp_path / "runs" / "run" / "outcome.json")
    assert written is not None
    assert (written.code, written.rank, written.step, written.consequence) == (1, 1, 1, False)


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    write_job(tmp_path, "die", rank=1)
    ended = run_command(LAUNCH, tmp_path)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.stderr
    # by its peer that waited for it, or by torchrun where that was quicker
    assert "rank 1" in ended.stderr or "Signal 9 (SIGKILL)" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_with_a_checkpoint_and_the_run_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    write_job(tmp_path, "wait", steps=40)
    with started(LAUNCH, tmp_path) as process:
        wait_until(lambda: (tmp_path / "waiting-0").exists() and (tmp_path / "waiting-1").exists())
        process.send_signal(number)
        ended = finish(process)
    assert ended.code == 75, ended
    assert "error:" not in ended.stderr
    assert ended.stderr.count("stopped by") == 1, ended.stderr
    assert "torch/distributed/" not in ended.stderr
    if number == signal.SIGUSR1:
        again = run_command([*LAUNCH, "--resume", "auto"], tmp_path)
        written = outcome.read(tmp_path / "runs" / "run" / "outcome.json")
        assert again.code == 0, again
        assert again.stderr.count("goes on from step") == 1, again.stderr
        assert written is not None
        assert written.code == 0
