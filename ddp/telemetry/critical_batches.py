"""Critical batch sizes that runs have measured, as `ddp critical-batch` leaves them in its result.json.

Never computed here: a *critical batch size* belongs to an optimizer and a target and takes runs; the noise scale
is a measurement of now. A job file that names a result has it shown beside the noise scale.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

from ddp.errors import UsageError
from ddp.job import read_plain_file

MOST_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class CriticalBatch:
    """One measured critical batch size, with the ends of its interval, in examples (NaN: not known)."""

    method: str
    optimizer: str
    target: str
    critical_batch_size: float
    low: float
    high: float


def read_critical_batches(result: str | None) -> tuple[CriticalBatch, ...]:
    """The results in the file that a job names; () where it names none.

    The file holds a JSON list of objects with the fields of `CriticalBatch`; other fields are ignored. One without
    a value, which runs did not bracket, is left out; of several for the same the last counts.

    Raises:
        UsageError: it cannot be read, or an entry lacks a field.
    """
    if result is None:
        return ()
    where = f"noise_scale.critical_batch_result: {result}"
    try:
        content = read_plain_file(result, MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{where}: cannot read it: {reason}; run `python -m ddp critical-batch` first") from None
    try:
        entries = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(entries, list):
        raise UsageError(f"{where}: not a result of `ddp critical-batch`, which is a list")
    read = [_critical_batch(entry, f"{where}: entry {number}") for number, entry in enumerate(entries, 1)]
    found = {(each.method, each.optimizer, each.target): each for each in read if each.critical_batch_size > 0}
    return tuple(found.values())


def _critical_batch(entry: Any, where: str) -> CriticalBatch:
    try:
        return CriticalBatch(
            method=str(entry["method"]),
            optimizer=str(entry["optimizer"]),
            target=str(entry["target"]),
            critical_batch_size=_number(entry["critical_batch_size"]),
            low=_number(entry["low"]),
            high=_number(entry["high"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        expected = ", ".join(field.name for field in fields(CriticalBatch))
        raise UsageError(f"{where}: {error!r}; it needs {expected}") from None


def _number(value: object) -> float:
    """JSON has no NaN: null stands for what a run did not bracket."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
