"""The `find-lr` command: options to a test, and what it found to the page and to standard output.

Imported by every command, so all that is heavy is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddp.command_options import AllowImport, AsJson, JobFile, Overrides
from ddp.errors import DdpError, DivergedError
from ddp.job import check_import, load_job
from ddp.ranked_command import print_on_rank_0, ranked

if TYPE_CHECKING:
    from ddp.lr_finder.finding import Finding

PAGE = Path("find-lr.html")


def find_lr(
    job_file: JobFile,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option("--from", metavar="RATE", help="The first learning rate.")] = 1e-7,
    high: Annotated[
        float | None,
        typer.Option("--to", metavar="RATE", help="The last one; where left out 10, or more until the loss blows up."),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of each pass.")] = 100,
    no_zoom: Annotated[bool, typer.Option("--no-zoom", help="Take the first pass alone.")] = False,
    page: Annotated[Path, typer.Option(metavar="FILE", help="Where the plot goes.")] = PAGE,
    allow_import: AllowImport = None,
    as_json: AsJson = False,
) -> None:
    """Find a learning rate by a range test, as one process or as one rank of several; the model is not changed."""
    with ranked() as here:
        job = load_job(job_file, overrides or ())
        check_import(job.task, allow_import or ())
        from ddp.lr_finder.range_test import HIGH, check_range, find_learning_rate
        from ddp.telemetry.page_file import check_page
        from ddp.training.agreement import together
        from ddp.training.session import session

        check_range(low, HIGH if high is None else high, steps)
        with session(job, here, allow_import=allow_import or ()) as opened:
            together(lambda: check_page(page) if here.rank == 0 else None)
            found = find_learning_rate(opened, low=low, high=high, steps=steps, zoom=not no_zoom)
            written = together(lambda: _write(found, page, job.task.name) if here.rank == 0 else None)
        print_on_rank_0(_as_json(found, written) if as_json else _in_words(found, written), here)
        _fail_without_suggestion(found)


def _write(found: Finding, page: Path, task: str) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from ddp.lr_finder.page import write_finding_page

    return write_finding_page(found, page, task)


def _as_json(found: Finding, page: Path | None) -> str:
    from ddp.lr_finder.finding import to_json

    return json.dumps({**to_json(found), "page": page and str(page)}, indent=2, allow_nan=False) + "\n"


def _in_words(found: Finding, page: Path | None) -> str:
    where = f"Plot: {page}" if page else "No plot: it needs matplotlib: pip install -e '.[report]'"
    lines = [found.verdict, found.setting, where] if found.recommended is not None else [where]  # the error says why
    return "\n".join(line for line in lines if line) + "\n"


def _fail_without_suggestion(found: Finding) -> None:
    """A script that goes on with the rate is to stop here; all ranks leave alike."""
    if found.kind == "not finite":
        raise DivergedError(f"find-lr: {found.verdict}")
    if found.recommended is None:
        raise DdpError(f"find-lr: {found.verdict}")
