"""What differs between Open MPI and MPICH, and what must not: the environments, bare mpirun, results and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mpi_environments
from jobs import Ended, finish, run_command, started, wait_until, write_job
from mpi_environments import MPI_NAMES, MpiEnvironment, mpi_environment

TRAIN = ("-m", "ddp", "train", "job.toml", "--allow-import", "misbehaving")

# Hydra mixes the ranks' lines, so each rank writes a file.
WHERE = """
import json, os, pathlib
from ddp.topology import from_environment
here = from_environment(os.environ)
import ddp, numba, torch, mpi4py
from mpi4py import MPI
array = torch.full((1009,), 1.0 + here.rank)
MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array.numpy())
modules = {each.__name__: each.__file__ for each in (ddp, numba, torch, mpi4py)}
said = {"library": MPI.Get_library_version(), "modules": modules, "sum": array.unique().tolist(),
        "place": [here.rank, here.world_size, here.local_rank, here.local_world_size], "given": os.environ["GIVEN"]}
pathlib.Path(f"rank-{here.rank}.json").write_text(json.dumps(said))
"""


@pytest.fixture
def mpich() -> MpiEnvironment:
    return mpi_environment("mpich")


def train(mpi: MpiEnvironment, ranks: int, folder: Path, *settings: str) -> Ended:
    """Ranks of a small job in `folder` under bare mpirun."""
    options = [part for setting in settings for part in ("--set", setting)]
    return run_command(mpi.command(ranks, *TRAIN, *options), folder, mpi.variables)


def where(mpi: MpiEnvironment, folder: Path) -> Sequence[dict[str, Any]]:
    """What three ranks, more than the cores of a small machine, say of themselves."""
    folder.mkdir()
    ended = run_command(mpi.command(3, "-c", WHERE), folder, {**mpi.variables, "GIVEN": "a b"})
    assert ended.code == 0, ended
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(3)]


def test_each_environment_has_its_own_mpi_and_shares_all_else(tmp_path: Path) -> None:
    said = {name: where(mpi_environment(name), tmp_path / name) for name in MPI_NAMES}
    for ranks in said.values():
        assert [each["place"] for each in ranks] == [[rank, 3, rank, 3] for rank in range(3)]
        assert [each["sum"] for each in ranks] == [[6.0]] * 3
        assert [each["given"] for each in ranks] == ["a b"] * 3
    openmpi, mpich = said["openmpi"][0], said["mpich"][0]
    assert openmpi["library"].startswith("Open MPI") and mpich["library"].startswith("MPICH")
    assert openmpi["modules"].pop("mpi4py") != mpich["modules"].pop("mpi4py")
    assert openmpi["modules"] == mpich["modules"]


def test_a_run_gives_the_same_numbers_under_both(tmp_path: Path) -> None:
    lines: list[str] = []
    for name in MPI_NAMES:
        folder = tmp_path / name
        folder.mkdir()
        write_job(folder, steps=4)
        ended = train(mpi_environment(name), 2, folder)
        assert ended.code == 0, ended
        assert '"code": 0' in (folder / "runs" / "run" / "outcome.json").read_text()
        lines += [line for line in ended.stdout.splitlines() if line.startswith("validation")]
    assert len(lines) == 2, lines
    assert lines[0] == lines[1]


def test_a_job_that_no_rank_can_read_is_code_2(mpich: MpiEnvironment, tmp_path: Path) -> None:
    ended = train(mpich, 2, tmp_path)
    assert ended.code == 2, ended
    assert "error: rank 0 on " in ended.stderr and "cannot read the job file" in ended.stderr


def test_a_run_that_diverges_is_code_3(mpich: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path)
    ended = train(mpich, 2, tmp_path, "optimizer.learning_rate=1e38")
    assert ended.code == 3, ended
    assert ended.stderr.count("error: ") == 1, ended.stderr


def test_a_rank_that_is_killed_ends_the_others(mpich: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path, "die", rank=1)
    assert train(mpich, 3, tmp_path).code == signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_bare_mpirun_passes_signals_on_and_waits(mpich: MpiEnvironment, tmp_path: Path, number: signal.Signals) -> None:
    """Open MPI's gives ranks a quarter of a second after SIGTERM, this one what they need to save."""
    write_job(tmp_path, "wait", steps=500)
    with started(mpich.command(2, *TRAIN), tmp_path, mpich.variables) as process:
        wait_until(lambda: all((tmp_path / f"waiting-{rank}").exists() for rank in range(2)))
        process.send_signal(number)
        ended = finish(process)
    assert ended.code == 75, ended
    assert ended.stderr.count(f"stopped by {number.name}") == 1, ended.stderr
    assert list((tmp_path / "runs" / "run" / "checkpoints").iterdir())


def test_an_mpirun_of_another_mpi_than_the_ranks_is_refused(mpich: MpiEnvironment, tmp_path: Path) -> None:
    write_job(tmp_path)
    openmpi = mpi_environment("openmpi")
    ended = run_command([mpich.mpirun, "-n", "2", openmpi.python, *TRAIN], tmp_path)
    assert ended.code == 2, ended
    assert "mpirun started 2 ranks, but mpi4py sees 1: it uses another MPI than this mpirun" in ended.stderr


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_the_environment_ci_fails_and_others_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(mpi_environments, "MPICH_PYTHON", tmp_path / ".venv-mpich" / "bin" / "python")
    with pytest.raises(outcome, match=r"^\.venv-mpich is missing: `make test` makes it$"):
        mpi_environment("mpich")


def test_make_keeps_the_environment_up_to_date_and_no_demo_waits_for_it(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((mpi_environments.ROOT / name).read_bytes())
    for at, stamp in enumerate((".venv/.made", "pyproject.toml", ".venv/.test", ".venv/.demo", ".venv-mpich/.made")):
        (tmp_path / stamp).parent.mkdir(exist_ok=True)
        (tmp_path / stamp).touch()
        os.utime(tmp_path / stamp, (1e9 + at, 1e9 + at))

    def would_run(target: str) -> str:
        shown = subprocess.run(
            ["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
        )
        return shown.stdout

    assert "MPICH" not in would_run("test") and ".venv-mpich" in would_run("clean")
    os.utime(tmp_path / "pyproject.toml")
    assert "MPICH" in would_run("test") and "MPICH" in would_run("bench") and "MPICH" not in would_run("demo")
