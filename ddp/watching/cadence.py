"""Which steps' layers are looked at: the same on all ranks, since what it is told comes out of an all-reduce."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Literal

AIM = 0.006  # of all steps' time
SECOND_LOOK = 16  # steps after the first, whose cost (what is cold, what is made once) says little
LARGEST_INTERVAL = 5_000
RELAXATION = 200  # steps since the start for each of the interval: a long run keeps some 200 looks for each factor of e
_LOOKS = 5  # newest, which decide


class Cadence:
    """Says which steps are watched.

    Args:
        every: steps between two looks, after the first step; "auto": from what they have cost.
    """

    def __init__(self, every: Literal["auto"] | int) -> None:
        self._fixed = None if every == "auto" else every
        self._last = 0
        self._costs: deque[float] = deque(maxlen=_LOOKS)
        self._steps: deque[float] = deque(maxlen=_LOOKS)

    def is_due(self, step: int) -> bool:
        """Whether `step`, 1 for the first, is to be watched."""
        if self._fixed is not None:
            return step == 1 or step % self._fixed == 0
        return not self._last or step < self._last or step - self._last >= self.interval(step)

    def interval(self, step: int) -> int:
        """Steps from the latest look to the next, as of `step`."""
        if self._fixed is not None:
            return self._fixed
        if len(self._costs) < 2 or not self._steps:
            return SECOND_LOOK
        allowed = AIM * median(self._steps)
        affordable = math.ceil(self._typical_cost() / allowed) if allowed > 0 else LARGEST_INTERVAL
        return max(min(affordable, LARGEST_INTERVAL), step // RELAXATION, 1)

    def looked(self, step: int, cost_seconds: float, step_seconds: float) -> None:
        """`step` was watched.

        Args:
            cost_seconds: what looking took, mean over ranks.
            step_seconds: of an ordinary step, mean over ranks; NaN where not known yet.
        """
        self._last = step
        self._costs.append(cost_seconds)
        if math.isfinite(step_seconds) and step_seconds > 0:
            self._steps.append(step_seconds)

    def _typical_cost(self) -> float:
        """Without the first look of the process; a median, so that one which the machine held up does not count."""
        return median(list(self._costs)[1:] if len(self._costs) < _LOOKS else self._costs)
