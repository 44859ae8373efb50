"""A value and the interval around it; and the way there from a logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Estimate:
    """In the value's own unit; low <= high, an end may be infinite, and the value too; all NaN where nothing is known."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Self:
        return cls(value, value, value)


def exp(logarithm: float) -> float:
    """Infinite where `math.exp` would overflow: an interval's end may lie anywhere."""
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf
