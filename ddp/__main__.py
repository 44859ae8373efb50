"""The command line. The worker is the same program whatever started it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from ddp import outcome, topology
from ddp.board import PhaseBoard
from ddp.checkpoint_command import checkpoints, export
from ddp.diagnostics.command import advise
from ddp.ending import leave
from ddp.errors import DdpError, StoppedError, UsageError
from ddp.job import Job, RedactingFormatter, check_exposure, check_import, hide_secrets_in_hooks, load_job
from ddp.outcome import STDERR_VARIABLE
from ddp.streams import open_missing_streams
from ddp.telemetry.command import query
from ddp.topology import SINGLE_PROCESS, Topology
from ddp.training.attempt import was_refused
from ddp.training.signals import STOP_SIGNALS

PRIVATE = 0o077  # what a run writes is its owner's alone, whatever the umask was

app = typer.Typer(
    help="Data-parallel training that measures the gradient noise scale.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
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
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the job as resolved, as TOML, and stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the job, print what would run, and stop.")] = False,
) -> None:
    """Train a job, as one process or as one rank of several (torchrun, mpirun, srun)."""
    here = SINGLE_PROCESS
    try:
        os.umask(PRIVATE)
        _stop_cleanly_outside_training()
        here = topology.from_environment(os.environ)
        board = PhaseBoard.make(here.rank)
        _show_errors_to_the_user(here)
        _show_log_to_the_user(here)
        job = load_job(job_file, overrides or ())
        if print_config or dry_run:
            _print_on_rank_0(job.to_toml() if print_config else plan(job, here), here)
            return
        check_import(job.task, allow_import or ())
        check_exposure(job.metrics, insecure=insecure)
        from ddp.training import run

        run_directory = run.train(
            job, here, resume=resume, allow_import=allow_import or (), insecure=insecure, board=board
        )
        if here.rank == 0:
            outcome.record(outcome.success(here.rank, here.world_size), run_directory)
    except BaseException as error:
        leave(error, here)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")]) -> None:
    """Write RUN_DIR/report.html, one self-contained page, from the run's record."""
    from ddp.telemetry.report import write_report

    os.umask(PRIVATE)
    print(write_report(run_directory))


app.command()(advise)
app.command()(checkpoints)
app.command()(export)
app.command()(query)


@app.command("critical-batch")
def critical_batch(
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the files.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the directory.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs side by side; one a core where left out.")
    ] = None,
    method: Annotated[
        Literal["sweep", "branched"],
        typer.Option(help="Whole runs over batch sizes, or branches of one run at multiples of its batch size."),
    ] = "sweep",
    checkpoint: Annotated[
        Path | None, typer.Option("--from", metavar="CHECKPOINT", help="branched: where its runs begin.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="SWEEP_DIR",
            help="branched: go to this sweep's targets and compare; else to those in its directory.",
        ),
    ] = None,
    allow_import: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Admit a task module:attr from MODULE or below it, which runs its code."),
    ] = None,
) -> None:
    """Measure the critical batch size by running: steps to a training loss over batch sizes and learning rates."""
    from ddp.search.branched import search_branches
    from ddp.search.critical_batch import search
    from ddp.search.findings import read_findings
    from ddp.search.findings_text import in_words
    from ddp.search.segment import check_comparable, compare_in
    from ddp.search.sweep_file import load_sweep

    _stop_cleanly_outside_training()
    if (method == "branched") != (checkpoint is not None):
        raise UsageError("--method branched and --from CHECKPOINT go together")
    if against is not None and checkpoint is None:
        raise UsageError("--against SWEEP_DIR goes with --method branched")
    sweep = load_sweep(sweep_file, overrides or ())
    if checkpoint is None:
        directory = search(sweep, resume=resume, workers=workers, allow_import=allow_import or ())
    else:
        if against is not None:
            check_comparable(sweep, against)
        directory = search_branches(
            sweep, checkpoint, against=against, resume=resume, workers=workers, allow_import=allow_import or ()
        )
    found = [in_words(each) for each in read_findings(directory)]
    print(directory, *found, *(each.in_words() for each in compare_in(directory, against)), sep="\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `ddp` and `python -m ddp`."""
    open_missing_streams()
    if was_refused(os.environ):
        sys.exit(UsageError.exit_code)
    hide_secrets_in_hooks()
    command = typer.main.get_command(app)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without some character must not fail a run
    try:
        code = command.main(None if arguments is None else list(arguments), prog_name="ddp", standalone_mode=False)
    except DdpError as error:
        leave(error, SINGLE_PROCESS)
    except Exception as error:
        if (message := getattr(error, "format_message", None)) is None:  # not one of click, or of typer's copy of it
            raise
        leave(UsageError(message()), _topology_or_single())
    sys.exit(code if isinstance(code, int) else 0)


def plan(job: Job, here: Topology) -> str:
    """What a dry run prints: how the job's batch is laid out over the ranks, and for how long."""
    batch, ranks = job.batch, here.world_size
    accumulation = batch.gradient_accumulation_steps(ranks)
    adapts = " at the start (auto)" if batch.adapts else ""
    length = f"steps {job.run.steps}" if job.run.steps is not None else f"epochs {job.run.epochs}"
    return (
        f"task {job.task.name}, {length}\n"
        f"ranks {ranks} ({here.launcher}, {here.local_world_size} on this node)\n"
        f"global_batch_size {batch.examples_per_step(ranks)}{adapts}, micro_batch_size {batch.examples_at_once(ranks)}, "
        f"gradient_accumulation_steps {accumulation}\n"
    )


def _print_on_rank_0(text: str, here: Topology) -> None:
    if here.rank == 0:
        sys.stdout.write(text)


def _topology_or_single() -> Topology:
    try:
        return topology.from_environment(os.environ)
    except UsageError:
        return SINGLE_PROCESS


def _stop_cleanly_outside_training() -> None:
    """While the trainer has no handlers of its own, a signal to stop ends this rank with the code for it.

    At once, without unwinding: an exception in the middle of an import of numpy's or torch's can abort the process. Only
    MPI wants to be taken down in order.
    """

    def stop(signal_number: int, _: FrameType | None) -> NoReturn:
        error = StoppedError(f"stopped by {signal.Signals(signal_number).name} outside of training: run again")
        if "mpi4py.MPI" in sys.modules:
            raise error
        try:
            leave(error, _topology_or_single())
        except SystemExit as left:
            os._exit(left.code if isinstance(left.code, int) else StoppedError.exit_code)
        except BaseException:  # whatever the signal came in the middle of
            os._exit(StoppedError.exit_code)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def _show_errors_to_the_user(here: Topology) -> None:
    """Write errors where `launch` said; on another node, or where that cannot be opened, leave them as they are."""
    path = os.environ.get(STDERR_VARIABLE)
    if path and here.one_node:
        with contextlib.suppress(OSError):
            user = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(user, sys.stderr.fileno())
            os.close(user)


def _show_log_to_the_user(here: Topology) -> None:
    """Rank 0 says on standard error what it chose for the run; the others speak up only where something is wrong."""
    log = logging.getLogger("ddp")
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO if here.rank == 0 else logging.WARNING)


if __name__ == "__main__":
    main()
