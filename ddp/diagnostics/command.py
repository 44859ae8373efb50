"""The `advise` command behind its options: texts to values, and an answer to the page and to standard output."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

from ddp.diagnostics.advice_page import write_page
from ddp.diagnostics.advice_text import text, to_json
from ddp.diagnostics.advise import Question, advise
from ddp.diagnostics.communication import Links
from ddp.errors import UsageError

MOST_RANKS = 1 << 20


def parse_ranks(listed: str) -> tuple[int, ...]:
    """Numbers such as "1,2,4" as numbers in order, each once; an empty text as none.

    Raises:
        UsageError: something that is no number of ranks.
    """
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if bad := [name for name in names if not (name.isdecimal() and 1 <= int(name) <= MOST_RANKS)]:
        raise UsageError(f"--ranks {listed}: {bad[0]!r} is not a number of ranks; write for example 1,2,4,8")
    return tuple(sorted(set(map(int, names))))


def links(gigabits: float, latency_microseconds: float) -> Links:
    """What the command line assumes between nodes."""
    rate = 1e9 * gigabits / 8
    return replace(Links(), link_bytes_per_second=rate, link_latency_seconds=1e-6 * latency_microseconds)


def answer(run_directory: Path, question: Question, *, as_json: bool) -> str:
    """Write `run_directory`/advice.html where matplotlib is there to draw it; return what is to be printed.

    Raises:
        UsageError: no record of a run, or what `advise` and writing a file refuse.
    """
    if question.memory is not None:
        sys.stderr.write(
            f"trying batches in a child process, {question.memory.seconds:g} s at most (--no-memory: not)\n"
        )
    advice = advise(run_directory, question)
    page = None
    if importlib.util.find_spec("matplotlib") is not None:
        page = write_page(advice, run_directory / "advice.html")
    if as_json:
        return json.dumps({**to_json(advice), "page": page and str(page)}, indent=2, allow_nan=False)
    where = f"Plot: {page}" if page else "No plot: it needs matplotlib: pip install -e '.[report]'"
    return f"{text(advice)}\n\n{where}"
