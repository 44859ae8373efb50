"""The command line of the launchers: `python -m launch torchrun|mpirun JOB.toml --nproc-per-node N`.

The job file is validated here, before anything starts; then the ranks run `python -m ddp train` with the same
job file, and this process answers for them.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ddp.errors import DdpError, UsageError
from ddp.job import RUN_ID_VARIABLE, Job, check_exposure, check_import, generate_run_id, load_job, resolve_run_id
from ddp.streams import open_missing_streams
from launch import mpirun, torchrun
from launch.submit import core_count, free_port, submit


class Launcher(StrEnum):
    """The programs that can start the ranks."""

    torchrun = "torchrun"
    mpirun = "mpirun"


@dataclass(frozen=True, slots=True)
class Command:
    """What is run, what is set for it, and what it is told on a signal."""

    argv: list[str]
    environment: dict[str, str]
    signals: Mapping[int, int]
    max_restarts: int = 0  # left to us; torchrun restarts ranks itself

    def text(self) -> str:
        """One line that a POSIX shell runs alike."""
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.argv])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def launch(
    launcher: Annotated[Launcher, typer.Argument(help="What starts the ranks.")],
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    nproc_per_node: Annotated[int, typer.Option("--nproc-per-node", min=1, help="Ranks.")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the job file.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on from the run's newest checkpoint, or from PATH.")
    ] = None,
    allow_import: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Admit a task module:attr from MODULE or below it, which runs its code."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve metrics to other machines without TLS, where metrics.host does.")
    ] = False,
    run_id: Annotated[str | None, typer.Option(help="The run's id, in place of the job file's.")] = None,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="How often all ranks are started again when one is lost.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the job, print the command, and stop.")] = False,
) -> None:
    """Run a job's ranks on this node and exit with the run's own code."""
    # JSON text of a valid run id is a TOML string too; without quotes an id of digits would be a number.
    named = [f'run.id="{run_id}"'] if run_id is not None else []
    settings = [*(overrides or ()), *named]
    job = load_job(job_file, settings)
    if not dry_run:  # which runs no code and serves nothing
        check_import(job.task, allow_import or ())
        check_exposure(job.metrics, insecure=insecure)
    now, token = datetime.now(UTC), secrets.token_hex(2)
    generated = generate_run_id(job_file.stem, now, token)
    run = resolve_run_id(job.run.id, os.environ, generated)
    if resume == "auto" and run == generated:
        raise UsageError("--resume auto: which run? Give its id, --run-id ID, or its directory, --resume PATH")
    worker = worker_arguments(job_file, settings, resume, allow_import or (), insecure=insecure)
    command = render(launcher, worker, nproc_per_node, {RUN_ID_VARIABLE: run}, max_restarts)
    if dry_run:
        print(command.text())
        return
    directory = run_directory(job, run, resume)
    code = submit(
        *(command.argv, command.environment, command.signals),
        max_restarts=command.max_restarts,
        run_directory=directory,
    )
    raise typer.Exit(code)


def run_directory(job: Job, run: str, resume: str | None) -> Path:
    """Where the ranks have the run: a path to resume says it, unless the job names another one."""
    if resume in (None, "auto") or job.run.id is not None:
        return Path(job.run.directory) / run
    path = Path(resume).resolve()
    return path if (path / "checkpoints").is_dir() else path.parent.parent


def worker_arguments(
    job_file: Path, settings: Sequence[str], resume: str | None, allow_import: Sequence[str], *, insecure: bool = False
) -> list[str]:
    """The interpreter's arguments for one rank."""
    arguments = ["-m", "ddp", "train", str(job_file)]
    for setting in settings:
        arguments += ["--set", setting]
    if resume is not None:
        arguments += ["--resume", resume]
    for module in allow_import:
        arguments += ["--allow-import", module]
    return [*arguments, "--insecure"] if insecure else arguments


def render(
    launcher: Launcher, worker: Sequence[str], ranks: int, environment: Mapping[str, str], max_restarts: int = 0
) -> Command:
    """The launcher's command on this machine: its free port, its cores, its mpirun."""
    if launcher is Launcher.torchrun:
        argv = torchrun.render(
            worker, ranks=ranks, port=free_port(), interpreter=sys.executable, max_restarts=max_restarts
        )
        return Command(argv, {**torchrun.environment(os.environ), **environment}, torchrun.SIGNALS)
    found = mpirun.find(sys.executable, os.environ.get("PATH"))
    flavour = mpirun.flavour_of(found)
    argv = mpirun.render(
        worker, flavour=flavour, ranks=ranks, cores=core_count(), mpirun=found, interpreter=sys.executable
    )
    return Command(argv, {**mpirun.environment(flavour, os.geteuid()), **environment}, mpirun.SIGNALS, max_restarts)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `ddp-launch` and `python -m launch`."""
    open_missing_streams()
    command = typer.main.get_command(app)
    try:
        code = command.main(None if arguments is None else list(arguments), prog_name="launch", standalone_mode=False)
    except DdpError as error:
        _fail(error)
    except Exception as error:
        if (message := getattr(error, "format_message", None)) is None:  # not one of click, or of typer's copy of it
            raise
        _fail(UsageError(message()))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: DdpError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
