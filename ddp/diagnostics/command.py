"""The `advise` command: options to a question, and the answer to the page and to standard output.

Imported by every command, so all that is heavy is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddp.command_options import AsJson
from ddp.diagnostics.communication import Links
from ddp.errors import UsageError

if TYPE_CHECKING:
    from ddp.diagnostics.advise import Question

MOST_RANKS = 1 << 20


def advise(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")],
    price: Annotated[
        float | None, typer.Option("--price-per-rank-hour", min=0.0, max=1e9, metavar="X", help="Costs in money.")
    ] = None,
    ranks: Annotated[
        str, typer.Option(metavar="1,2,4,...", help="Numbers of ranks to tell of; powers of two where left out.")
    ] = "",
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The run's own where it had several nodes, else 8.")
    ] = None,
    link_gbits: Annotated[
        float,
        typer.Option(min=1e-3, max=1e9, metavar="G", help="Assumed of a node's link, unless the run measured it."),
    ] = 25.0,
    link_latency_us: Annotated[
        float, typer.Option(min=0.0, max=1e9, metavar="US", help="Assumed of a message between nodes.")
    ] = 20.0,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Do not try how large a batch fits, nor count classes.")
    ] = False,
    memory_per_rank: Annotated[
        float | None,
        typer.Option(min=0.1, max=1e9, metavar="GIB", help="Of a rank; a part of what is free where left out."),
    ] = None,
    memory_seconds: Annotated[float, typer.Option(min=1.0, metavar="S", help="Trying batches ends then.")] = 60.0,
    allow_import: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE", help="Admit a task module:attr from MODULE or below it where batches are tried."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what more ranks or another batch would bring, from a run's record; writes RUN_DIR/advice.html."""
    from ddp.diagnostics.advise import MemoryQuestion, Question

    memory_bytes = None if memory_per_rank is None else int(memory_per_rank * 2**30)
    question = Question(
        ranks=parse_ranks(ranks),
        price_per_rank_hour=price,
        ranks_per_node=ranks_per_node,
        links=Links(link_bytes_per_second=1e9 * link_gbits / 8, link_latency_seconds=1e-6 * link_latency_us),
        memory=None if no_memory else MemoryQuestion(memory_seconds, memory_bytes, tuple(allow_import or ())),
    )
    print(answer(run_directory, question, as_json=as_json))


def parse_ranks(listed: str) -> tuple[int, ...]:
    """Numbers such as "1,2,4" as numbers in order, each once; an empty text as none.

    Raises:
        UsageError: something that is no number of ranks.
    """
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if bad := [name for name in names if not (name.isdecimal() and 1 <= int(name) <= MOST_RANKS)]:
        raise UsageError(f"--ranks {listed}: {bad[0]!r} is not a number of ranks; write for example 1,2,4,8")
    return tuple(sorted(set(map(int, names))))


def answer(run_directory: Path, question: Question, *, as_json: bool) -> str:
    """Write `run_directory`/advice.html where matplotlib is there to draw it; return what is to be printed.

    Raises:
        UsageError: no record of a run, or what `advise` and writing a file refuse.
    """
    from ddp.diagnostics.advice_page import write_advice_page
    from ddp.diagnostics.advice_text import text, to_json
    from ddp.diagnostics.advise import advise as ask

    if question.memory is not None:
        sys.stderr.write(
            f"trying batches in a child process, {question.memory.seconds:g} s at most (--no-memory: not)\n"
        )
    advice = ask(run_directory, question)
    page = None
    if importlib.util.find_spec("matplotlib") is not None:
        page = write_advice_page(advice, run_directory / "advice.html")
    if as_json:
        return json.dumps({**to_json(advice), "page": page and str(page)}, indent=2, allow_nan=False)
    where = f"Plot: {page}" if page else "No plot: it needs matplotlib: pip install -e '.[report]'"
    return f"{text(advice)}\n\n{where}"
