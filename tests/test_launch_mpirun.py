from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ddp import outcome
from ddp.errors import UsageError
from jobs import finish, python, run_command, started, wait_until, write_job
from launch import mpirun
from launch.mpirun import Flavour
from mpi_environments import MpiEnvironment


def launch(mpi: MpiEnvironment, ranks: int = 2) -> list[str]:
    """The launcher's argv in that MPI's environment."""
    return [
        mpi.python,
        "-m",
        "launch",
        "mpirun",
        "job.toml",
        "--nproc-per-node",
        str(ranks),
        "--allow-import",
        "misbehaving",
    ]


@pytest.mark.parametrize(
    "flavour, ranks, options",
    [
        (Flavour.openmpi, 1, ["--bind-to", "none"]),
        (Flavour.openmpi, 2, []),
        (Flavour.openmpi, 3, ["--map-by", ":OVERSUBSCRIBE"]),
        (Flavour.mpich, 1, []),
        (Flavour.mpich, 3, []),
    ],
)
def test_render(flavour: Flavour, ranks: int, options: list[str]) -> None:
    """Fewer ranks than cores, as many, and more."""
    argv = mpirun.render(
        ["-m", "ddp"], flavour=flavour, ranks=ranks, cores=2, mpirun="/opt/mpirun", interpreter="/opt/python"
    )
    assert argv == ["/opt/mpirun", "-n", str(ranks), *options, "/opt/python", "-m", "ddp"]


def test_only_root_needs_leave_and_of_open_mpi_only() -> None:
    assert mpirun.environment(Flavour.openmpi, 1000) == {}
    assert mpirun.environment(Flavour.openmpi, 0) == {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    assert mpirun.environment(Flavour.mpich, 0) == {}


def test_whose_mpirun_it_is(mpi: MpiEnvironment) -> None:
    assert mpirun.flavour_of(mpi.mpirun) == mpi.name


@pytest.mark.parametrize(
    "script, said",
    [
        ("#!/bin/sh\necho 'mpirun 1.0 of a vendor'\n", "neither Open MPI's nor MPICH's.*'mpirun 1.0 of a vendor'"),
        ("#!/bin/sh\nexit 1\n", "says 'nothing'"),
        ("#!/no/such/interpreter\n", "does not say its version"),
    ],
)
def test_an_mpirun_of_nobody_known_is_refused(tmp_path: Path, script: str, said: str) -> None:
    program = tmp_path / "mpirun"
    program.write_text(script)
    program.chmod(0o755)
    with pytest.raises(UsageError, match=said):
        mpirun.flavour_of(str(program))


def test_mpirun_beside_the_interpreter_comes_first(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / "mpirun").touch(mode=0o755)
    assert mpirun.find(str(own / "python"), str(other)) == str(own / "mpirun")
    (own / "mpirun").unlink()
    assert mpirun.find(str(own / "python"), str(other)) == str(other / "mpirun")
    with pytest.raises(UsageError, match=r"no mpirun .*\.\[mpi\]"):
        mpirun.find(str(own / "python"), str(own))


def test_no_mpi4py_is_refused_before_anything_starts(tmp_path: Path) -> None:
    write_job(tmp_path)
    # A Python without site-packages of mpi4py: what the launcher asks is whether it can be found.
    without = "import sys; sys.modules['mpi4py'] = None; from launch.__main__ import main; main()"
    ended = run_command(python("-c", without, "mpirun", "job.toml", "--allow-import", "misbehaving"), tmp_path)
    assert ended.code == 2, ended
    assert ended.stderr.count("\n") == 1
    assert ".[mpi]" in ended.stderr


def test_three_ranks_on_two_cores_reach_the_end(mpi: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path, steps=2)
    ended = run_command(launch(mpi, 3), tmp_path, {"PRTE_MCA_rmaps_default_mapping_policy": ""})
    written = outcome.read(tmp_path / "runs" / "run" / "outcome.json")
    assert ended.code == 0, ended
    assert written is not None
    assert written.code == 0


def test_a_rank_that_raises_ends_all_and_is_shown_once(mpi: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path, "raise", rank=1)
    ended = run_command(launch(mpi), tmp_path)
    assert ended.code == 1, ended
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 on ")
    assert last.endswith("step 1: ValueError: this is the cause")


def test_a_rank_that_is_killed_ends_all(mpi: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path, "die", rank=0)
    ended = run_command(launch(mpi), tmp_path)
    assert ended.code == 1, ended
    # MPICH's mpirun kills the others before they can tell, and says so itself, on stdout.
    assert "rank 0" in ended.stderr or "signal 9" in ended.stdout + ended.stderr


def test_sigterm_stops_with_a_checkpoint(mpi: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path, "wait", steps=500)
    with started(launch(mpi), tmp_path) as process:
        wait_until(lambda: (tmp_path / "waiting-0").exists() and (tmp_path / "waiting-1").exists())
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert ended.code == 75, ended
    assert ended.stderr.count("stopped by") == 1, ended.stderr
    assert list((tmp_path / "runs" / "run" / "checkpoints").iterdir())


def test_bare_mpirun_ends_all_ranks_when_one_raises(mpi: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path, "raise", rank=1)
    ended = run_command(
        mpi.command(2, "-m", "ddp", "train", "job.toml", "--allow-import", "misbehaving"), tmp_path, mpi.variables
    )
    assert ended.code == 1, ended
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert ended.stderr.count("error: rank 1 on ") == 1, ended.stderr
    assert "error: rank 0" not in ended.stderr
