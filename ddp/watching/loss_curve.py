"""A run's losses in bounded memory: means and wiggle over stretches of equal length, which double as the run grows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_STRETCHES = 256
FIRST_STEPS = 3  # whose mean is the loss at the start


@dataclass(slots=True)
class Stretch:
    """Some successive steps: how many, the sum of their losses, the sum of squares of differences from step to step."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, other: Stretch) -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares


class LossCurve:
    """Takes every step's loss; ones that are not finite are left out."""

    def __init__(self) -> None:
        self._stretches: list[Stretch] = []
        self._width = 1
        self._first: list[float] = []
        self._previous, self._last_step = math.nan, 0  # of the last step that counted

    @property
    def start(self) -> float:
        """The loss before anything was learned; NaN before the first step."""
        return sum(self._first) / len(self._first) if self._first else math.nan

    @property
    def steps(self) -> int:
        return sum(each.count for each in self._stretches)

    def observe(self, step: int, loss: float) -> None:
        """`step` is 1 for the first."""
        if not math.isfinite(loss):
            return
        if len(self._first) < FIRST_STEPS:
            self._first.append(loss)
        while (place := (step - 1) // self._width) >= MOST_STRETCHES:
            self._halve()
        self._stretches += [Stretch() for _ in range(place + 1 - len(self._stretches))]
        square = (loss - self._previous) ** 2 if math.isfinite(self._previous) else 0.0
        self._stretches[place].add(Stretch(1, loss, square))
        self._previous, self._last_step = loss, step

    def forget_after(self, step: int) -> None:
        """The steps after `step` come again; of the stretch that it lies in all goes that is later, too, as a mean."""
        if self._last_step <= step:
            return  # it has been brought back already
        del self._stretches[math.ceil(step / self._width) :]
        self._previous, self._last_step = math.nan, step

    def mean(self, begin: float, end: float) -> float:
        """The mean loss between two shares of the steps so far, 0 to 1; at least one stretch."""
        return _mean(self._between(begin, end))

    def wiggle(self, begin: float, end: float) -> float:
        """Standard deviation of a step's loss around the curve, from differences between neighbours."""
        chosen = self._between(begin, end)
        count = sum(each.count for each in chosen)
        return math.sqrt(sum(each.squares for each in chosen) / (2 * count)) if count else math.nan

    def latest(self, steps: int) -> float:
        """The mean loss of about so many latest steps."""
        chosen: list[Stretch] = []
        for each in reversed(self._stretches):
            chosen.append(each)
            if sum(kept.count for kept in chosen) >= steps:
                break
        return _mean(chosen)

    def _between(self, begin: float, end: float) -> list[Stretch]:
        length = len(self._stretches)
        first = min(int(begin * length), length - 1)
        return self._stretches[max(first, 0) : max(math.ceil(end * length), first + 1)]

    def _halve(self) -> None:
        for pair in range(0, len(self._stretches) - 1, 2):
            self._stretches[pair].add(self._stretches[pair + 1])
        self._stretches, self._width = self._stretches[::2], 2 * self._width

    def state_dict(self) -> dict[str, Any]:
        return {
            "stretches": [[each.count, each.total, each.squares] for each in self._stretches],
            "width": self._width,
            "first": list(self._first),
            "previous": self._previous,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        stretches = [Stretch(int(count), float(total), float(squares)) for count, total, squares in state["stretches"]]
        self._width, self._first = int(state["width"]), [float(each) for each in state["first"]]
        self._stretches, self._previous = stretches, float(state["previous"])
        self._last_step = int(state["last_step"])


def _mean(stretches: list[Stretch]) -> float:
    count = sum(each.count for each in stretches)
    return sum(each.total for each in stretches) / count if count else math.nan
