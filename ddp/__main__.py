"""The command line. The worker is the same program whatever started it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from ddp import outcome
from ddp.board import PhaseBoard
from ddp.check.command import check
from ddp.checkpoint_command import checkpoints, export
from ddp.command_options import AllowImport, JobFile, Overrides
from ddp.diagnostics.command import advise
from ddp.ending import leave
from ddp.ensemble.command import ensemble
from ddp.errors import DdpError, UsageError
from ddp.evaluate_command import evaluate
from ddp.job import Job, check_exposure, check_import, hide_secrets_in_hooks, load_job
from ddp.landscape.command import landscape
from ddp.lr_finder.command import find_lr
from ddp.ranked_command import PRIVATE, print_on_rank_0, ranked, stop_cleanly_outside_training, topology_or_single
from ddp.streams import open_missing_streams
from ddp.sweep.command import sweep
from ddp.telemetry.command import query
from ddp.topology import SINGLE_PROCESS, Topology
from ddp.training.attempt import was_refused

app = typer.Typer(
    help="Data-parallel training that measures the gradient noise scale.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    job_file: JobFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on from the run's newest checkpoint, or from PATH.")
    ] = None,
    allow_import: AllowImport = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve metrics to other machines without TLS, where metrics.host does.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the job as resolved, as TOML, and stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the job, print what would run, and stop.")] = False,
) -> None:
    """Train a job, as one process or as one rank of several (torchrun, mpirun, srun)."""
    with ranked() as here:
        board = PhaseBoard.make(here.rank)
        job = load_job(job_file, overrides or ())
        if print_config or dry_run:
            print_on_rank_0(job.to_toml() if print_config else plan(job, here), here)
            return
        check_import(job.task, allow_import or ())
        check_exposure(job.metrics, insecure=insecure)
        from ddp.training import run

        run_directory = run.train(
            job, here, resume=resume, allow_import=allow_import or (), insecure=insecure, board=board
        )
        if here.rank == 0:
            outcome.record(outcome.success(here.rank, here.world_size), run_directory)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")]) -> None:
    """Write RUN_DIR/report.html, one self-contained page, from the run's record."""
    from ddp.telemetry.report import write_report

    os.umask(PRIVATE)
    print(write_report(run_directory))


app.command()(check)
app.command()(advise)
app.command()(checkpoints)
app.command()(export)
app.command()(sweep)
app.command()(evaluate)
app.command("find-lr")(find_lr)
app.command()(query)
app.command()(ensemble)
app.command()(landscape)


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
    allow_import: AllowImport = None,
) -> None:
    """Measure the critical batch size by running: steps to a training loss over batch sizes and learning rates."""
    from ddp.search.branched import search_branches
    from ddp.search.critical_batch import search
    from ddp.search.findings import read_findings
    from ddp.search.findings_text import in_words
    from ddp.search.segment import check_comparable, compare_in
    from ddp.search.sweep_file import load_sweep

    stop_cleanly_outside_training()
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
        leave(UsageError(message()), topology_or_single())
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


if __name__ == "__main__":
    main()
