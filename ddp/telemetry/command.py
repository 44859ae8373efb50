"""`python -m ddp query`: SQL over the records of one run or many."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ddp.errors import UsageError


def query(
    question: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT.")],
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR...", help="Directories of runs, or patterns: 'runs/*'.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="With a line of names.")] = False,
) -> None:
    """Ask the records of runs: tables training, validation, parameters, runs, events, steps and more, each with run_id."""
    from ddp.telemetry.query import ask, render

    if as_json and as_csv:
        raise UsageError("give either --json or --csv")
    text = render(ask(question, runs), "json" if as_json else "csv" if as_csv else "table")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left would fail again when the interpreter ends
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
