"""The `sweep` command: options to a master, and what it found to the page, the files and standard output.

Imported by every command, so all that is heavy is imported when it is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ddp.command_options import AllowImport

PRIVATE = 0o077


def sweep(
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="The sweep file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the files.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in the directory.")] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Begin it or work beside others that run it: array tasks, other nodes.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Trials side by side; cores / ranks where left out.")
    ] = None,
    allow_import: AllowImport = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the files, print what would run, and stop.")
    ] = False,
) -> None:
    """Search settings by running: ranges and choices of job-file keys, coarse to fine, ranked on the validation set."""
    from ddp.job import check_import
    from ddp.sweep.sweep_file import load_sweep
    from ddp.training.signals import stop_on_signals

    os.umask(PRIVATE)
    with stop_on_signals() as stop:
        wanted = load_sweep(sweep_file, overrides or ())
        if dry_run:
            from ddp.sweep.dry_run import plan_text

            print(plan_text(wanted))
            return
        check_import(wanted.job.task, allow_import or ())
        from ddp.sweep.findings_text import in_words
        from ddp.sweep.journal import imported_optuna
        from ddp.sweep.master import run_sweep

        imported_optuna()
        found = run_sweep(wanted, stop, resume=resume, join=join, workers=workers, allow_import=allow_import or ())
    print(wanted.directory, in_words(found), sep="\n")
