"""Values of a `run.db`, which SQLite stores as they come: a text may stand where a number should.

The file may be damaged, or have been changed by hand. Then it is refused with one message, wherever it is read.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from ddp.errors import UsageError
from ddp.telemetry.records import RunInfo

Word = TypeVar("Word", bound=str)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """While the record at `path` is read, or shown.

    Raises:
        UsageError: what is in it cannot be read, or makes no sense.
    """
    try:
        yield
    except (sqlite3.Error, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UsageError(f"{path}: cannot read the record of the run: {error}") from None


def number(value: object) -> float:
    """A measured number, for which SQLite has NULL where it is NaN."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)


def whole(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r:.40} is not a whole number")
    return value


def one_of(words: Sequence[Word], value: object) -> Word:
    for word in words:
        if value == word:
            return word
    raise ValueError(f"{value!r:.40} is none of {', '.join(words)}")


def run_info(row: sqlite3.Row) -> RunInfo:
    for field in fields(RunInfo):
        if field.type == "int":
            whole(row[field.name])
        elif field.type in ("float", "float | None"):
            number(row[field.name])
    return RunInfo(**{**row, "batch_statistics": bool(row["batch_statistics"])})
