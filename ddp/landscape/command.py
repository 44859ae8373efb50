"""The `landscape` command: options to a survey, and what it found to the page, to JSON and to standard output.

Imported by every command, so all that is heavy is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddp.command_options import AllowImport, AsJson
from ddp.errors import UsageError
from ddp.ranked_command import print_on_rank_0, ranked
from ddp.trained import job_of, without_transport

if TYPE_CHECKING:
    from ddp.landscape.finding import Asked, Landscape

PAGE = Path("landscape.html")


def landscape(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT|RUN_DIR...", help="Networks, drawn side by side; of a run its newest checkpoint."
        ),
    ],
    radius: Annotated[
        float, typer.Option(metavar="R", help="The slice goes so far each way; 1: each filter moves by its own norm.")
    ] = 1.0,
    points: Annotated[int, typer.Option(min=3, max=501, metavar="N", help="Along each side; an odd number.")] = 25,
    examples: Annotated[int, typer.Option(min=1, metavar="N", help="At most, that the loss is a mean over.")] = 512,
    split: Annotated[
        Literal["training", "validation"],
        typer.Option(help="Whose loss; training is the sample that training evaluates."),
    ] = "training",
    averaged: Annotated[
        bool, typer.Option("--averaged", help="Of each network the moving average of its weights.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random directions.")] = 0,
    page: Annotated[
        Path, typer.Option(metavar="FILE.html", help="Where the picture goes; the numbers go beside it, as .json.")
    ] = PAGE,
    allow_import: AllowImport = None,
    as_json: AsJson = False,
) -> None:
    """Draw the loss around trained weights, as one process or as one rank of several."""
    with ranked() as here:
        if not (radius > 0 and math.isfinite(radius)):
            raise UsageError(f"--radius {radius:g}: a number above 0 is needed")
        if points % 2 == 0:
            raise UsageError(
                f"--points {points}: an odd number is needed, so that the trained weights are in the middle"
            )
        if page.suffix == ".json":
            raise UsageError(f"--page {page}: the numbers go there, the picture beside it: name it .html")
        job = without_transport(job_of(sources[0]))
        from ddp.landscape.finding import Asked, survey, to_json
        from ddp.telemetry.page_file import check_page
        from ddp.trained import load_trained
        from ddp.training.agreement import together
        from ddp.training.place import opened_place

        asked = Asked(radius, points, examples, split, seed)
        with opened_place(job, here) as place:
            together(lambda: check_page(page) if here.rank == 0 else None)
            networks = load_trained(place, sources, averaged=averaged, allow_import=allow_import or ())
            found = [survey(place, each, asked) for each in networks]
            written = together(lambda: _write(found, asked, page) if here.rank == 0 else [])
        text = json.dumps(to_json(found, asked), allow_nan=False) if as_json else in_words(found, written)
        print_on_rank_0(f"{text}\n", here)


def in_words(found: Sequence[Landscape], written: Sequence[Path]) -> str:
    """A line for each network, and where the rest is."""
    width = max(len(each.name) for each in found)
    lines: list[str] = []
    for each in found:
        rises = ", ".join(f"{rise.mean:.4g} at {rise.radius:g}" for rise in each.sharpness)
        eigenvalue = (
            "" if math.isnan(each.largest_eigenvalue) else f"; largest Hessian eigenvalue {each.largest_eigenvalue:.4g}"
        )
        lines.append(f"{each.name.ljust(width)}  {each.optimizer}: loss {each.loss:.4g}; mean rise {rises}{eigenvalue}")
    if len(written) == 1:
        lines.append("No picture: it needs matplotlib: pip install -e '.[report]'")
    return "\n".join([*lines, *map(str, written)])


def _write(found: Sequence[Landscape], asked: Asked, page: Path) -> list[Path]:
    """The picture where matplotlib is there to draw it, and the numbers."""
    from ddp.landscape.finding import to_json
    from ddp.telemetry.page_file import write_page

    numbers = page.with_suffix(".json")
    written = [write_page(numbers, json.dumps(to_json(found, asked), allow_nan=False) + "\n")]
    if importlib.util.find_spec("matplotlib") is not None:
        from ddp.landscape.page import write_landscape_page

        written.insert(0, write_landscape_page(found, asked, page))
    return written
