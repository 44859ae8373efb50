"""One question to many runs' records, strictly read-only, and its answer as text: a table, JSON or CSV.

The question is whatever SQL somebody writes: it may read the gathered copy and nothing else. Attaching a file, a pragma,
or `VACUUM INTO` are refused by SQLite's authorizer before they are run.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddp.errors import UsageError
from ddp.telemetry.gather import gather

Form = Literal["table", "json", "csv"]
ALLOWED = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }  # what a question needs
)
OPERATIONS_BETWEEN_LOOKS = 1_000_000  # of SQLite's machine, after which an interrupt is noticed


@dataclass(frozen=True, slots=True)
class Answer:
    """Column names and rows; a value is None, a number, a text or bytes."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def ask(question: str, paths: Sequence[str | Path]) -> Answer:
    """The answer of one SELECT over the runs under `paths`; see `gather` for tables and paths.

    Raises:
        UsageError: a record cannot be read; the question is not understood, or wants more than to read.
    """
    with closing(gather(paths)) as database:
        database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)
        database.set_progress_handler(lambda: 0, OPERATIONS_BETWEEN_LOOKS)
        try:
            cursor = database.execute(question)
            if cursor.description is None:
                raise UsageError("the query gives no rows: write a SELECT")
            return Answer(tuple(name for name, *_ in cursor.description), cursor.fetchall())
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise UsageError(f"query: {error}{_hint(error)}") from None


def _hint(error: Exception) -> str:
    text = str(error)
    if any(word in text for word in ("not authorized", "prohibited", "denied")):
        return ": a query may read the runs' tables and nothing else"
    if "no such table" in text:
        return "; there are training, validation, parameters, runs, evaluations, events, steps and more (schema.py)"
    return ""


def render(answer: Answer, form: Form = "table") -> str:
    """As text that ends with a line's end. JSON has null for NaN, and texts for infinities and bytes.

    Raises:
        UsageError: two columns have one name, of which an object of JSON would keep one.
    """
    if form == "json":
        if twice := [name for name, count in Counter(answer.columns).items() if count > 1]:
            raise UsageError(
                f"query: several columns are called {', '.join(twice)}: name them apart with AS, or take --csv"
            )
        rows = [dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows]
        return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows([["" if value is None else _plain(value) for value in row] for row in answer.rows])
        return text.getvalue()
    return _table(answer)


def _table(answer: Answer) -> str:
    """Numbers to the right, texts to the left; nothing that a record says moves the terminal's cursor."""
    cells = [[one_line(_cell(value)) for value in row] for row in answer.rows]
    heads = [one_line(name) for name in answer.columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    to_the_right = [
        all(value is None or isinstance(value, int | float) for value in column)
        for column in zip(*answer.rows, strict=True)
    ] or [False] * len(heads)
    lines = [heads, ["-" * width for width in widths], *cells]
    aligned = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_the_right, strict=True)
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned) + "\n"


def one_line(text: str) -> str:
    """With what cannot be printed written as an escape: line ends, and what a terminal would obey."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
