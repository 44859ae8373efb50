"""What a check says: one line with its status, what was found and what to do; and all of them as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "failed", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "failed", "skipped")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check's answer.

    Attributes:
        check: its name, the same in every run.
        found: what was seen, with figures; of a skipped check the reason.
        advice: what to do; empty where there is nothing.
        figures: the numbers behind it, plain values, for `--json`.
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{self.status:<8} {self.check}: {self.found}{advice}"


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many there are of each status."""
    return ", ".join(f"{count} {status}" for status in STATUSES if (count := _count(verdicts, status)))


def to_json(verdicts: Sequence[Verdict]) -> str:
    """One object: the counts and the verdicts in order; numbers that JSON has not are null."""
    table = {
        "counts": {status: _count(verdicts, status) for status in STATUSES},
        "checks": [
            {
                "check": verdict.check,
                "status": verdict.status,
                "found": verdict.found,
                "advice": verdict.advice,
                "figures": finite(dict(verdict.figures)),
            }
            for verdict in verdicts
        ],
    }
    return json.dumps(table, indent=2, allow_nan=False)


def failed(verdicts: Sequence[Verdict]) -> list[str]:
    """The names of the checks that failed."""
    return [verdict.check for verdict in verdicts if verdict.status == "failed"]


def finite(value: Any) -> Any:
    """Plain values with null in place of what is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def several(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"


def _count(verdicts: Sequence[Verdict], status: Status) -> int:
    return sum(verdict.status == status for verdict in verdicts)
