"""A learning rate that falls where evaluations gain nothing any more: torch's ReduceLROnPlateau on a metric that all ranks have.

Kept as a share of the peak, so that warm-up and the rule for the batch size apply as they do to the other schedules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ddp.job import ScheduleSection

SMALLEST_FALL = 1e-8  # of the rate; what would be less is left out, as in torch


@dataclass(slots=True)
class Plateau:
    """What the rate has come down to, and how long nothing was gained; torch's rules, step by step.

    An evaluation is a gain where it beats the best by `threshold`, a share of the best or an amount. More than
    `patience` in a row that are none, and the rate falls by `factor`, to `min_learning_rate` at the least; the `cooldown`
    evaluations after that are not counted. One that is not a number is no gain.
    """

    section: ScheduleSection
    goal: Literal["min", "max"]
    peak: float  # learning rate
    scale: float = 1.0  # of the peak, that is left
    best: float = math.nan  # NaN before the first
    evaluations_without_gain: int = 0
    cooldown_left: int = 0
    last_step: int = -1  # of the last evaluation that was taken

    def observe(self, step: int, value: float) -> bool:
        """Take the metric as evaluated after `step`, once each; whether the rate falls."""
        if step <= self.last_step:
            return False
        self.last_step = step
        if self._is_gain(value):
            self.best, self.evaluations_without_gain = value, 0
        else:
            self.evaluations_without_gain += 1
        if self.cooldown_left:
            self.cooldown_left -= 1
            self.evaluations_without_gain = 0
        if self.evaluations_without_gain <= self.section.patience:
            return False
        self.cooldown_left, self.evaluations_without_gain = self.section.cooldown, 0
        return self._fall()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: it is none.
        """
        scale, best, counts = state["scale"], state["best"], [state[name] for name in _KEPT[2:]]
        if type(scale) is not float or not 0 <= scale <= 1 or type(best) not in (int, float):
            raise ValueError(f"a plateau at {scale!r} of its rate, the best at {best!r}")
        if any(type(count) is not int or count < -1 for count in counts):
            raise ValueError(f"a plateau with the counts {counts!r}")
        for name in _KEPT:
            setattr(self, name, state[name])

    def _is_gain(self, value: float) -> bool:
        if math.isnan(self.best):
            return not math.isnan(value) and value != (math.inf if self.goal == "min" else -math.inf)
        sign = -1.0 if self.goal == "min" else 1.0
        threshold = sign * self.section.threshold
        bound = self.best * (1.0 + threshold) if self.section.threshold_mode == "relative" else self.best + threshold
        return sign * value > sign * bound

    def _fall(self) -> bool:
        before = self.peak * self.scale
        after = max(before * (self.section.factor or 1.0), self.section.min_learning_rate)
        if before - after <= SMALLEST_FALL:
            return False
        self.scale = after / self.peak
        return True


_KEPT = ("scale", "best", "evaluations_without_gain", "cooldown_left", "last_step")
