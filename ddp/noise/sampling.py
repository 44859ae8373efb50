"""How often to look closer: every K-th step, with K from what looking has cost, and fewer steps near the start.

Rows carry each rank's cost and time of the previous step, so all ranks see the same numbers and choose the same K.
Only what leaves training as it is may be sampled by the clock: a run must not depend on how fast its machine was.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

from ddp.errors import CheckpointError

AIM = 0.005  # of a step's time, on average
LARGEST_INTERVAL = 100
STEADY_INTERVAL = 16  # where training depends on what is sampled
RELAXATION = 50  # steps since the start for each of K: 25 observations lie in the last two fifths of these
RENEWAL = 12  # steps since a `restart` for each of K: 25 observations come in the first 27
COST_CYCLE = 4  # sampled steps after which what they cost repeats: the tracker reads the parts in one of them
_COSTS, _STEPS = 3 * COST_CYCLE, 25  # newest sampled steps, and newest steps, which decide


SampleEvery = Literal["auto", "steady"] | int


def relaxed(step: int, restarted: int = 0) -> int:
    """The largest K at `step`: the noise scale moves with the logarithm of the steps, and a window must not span much
    of a run. The first 99 steps are all sampled, which fills windows. What that costs of a run `benchmarks/train_step.py` tells.
    """
    if restarted:
        return max(1, min(step // RELAXATION, (step - restarted) // RENEWAL))
    return max(1, step // RELAXATION)


class SamplingCadence:
    """Says which steps are sampled; the same on all ranks that have seen the same rows.

    Args:
        every: K; "auto": from what looking has cost; "steady": `STEADY_INTERVAL`, whatever it costs, so that what
            follows from the readings (a learning rate) is the same in every run. Unless it is given, K is at most
            `relaxed`, so that early in a run "auto" costs more than it aims at.

    Attributes:
        every: K, steps from one sampled step to the next, once a run is long.
        restarted: the step of the last `restart`; 0 without one.
    """

    def __init__(self, every: SampleEvery) -> None:
        self._fixed = None if isinstance(every, str) else every
        self._by_clock = every == "auto"
        self.every = self._fixed or (1 if self._by_clock else STEADY_INTERVAL)
        self._last = self.restarted = 0
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._steps: deque[float] = deque(maxlen=_STEPS)

    def is_due(self, step: int) -> bool:
        """Whether `step`, 1 for the first, is to be sampled."""
        if self._fixed is not None:
            return step % self._fixed == 0
        return step - self._last >= self.interval(step)

    def interval(self, step: int) -> int:
        """K as of `step`."""
        return self._fixed or min(self.every, relaxed(step, self.restarted))

    def restart(self, step: int) -> None:
        """What is measured is another thing from after `step` on, and is to be seen soon."""
        self.restarted = step

    def took(self, step: int) -> None:
        """`step` was sampled."""
        self._last = step

    def observe(self, measuring_seconds: float, step_seconds: float) -> None:
        """What the slowest rank spent on measuring in a step, 0 where it was not sampled, and on all of that step."""
        if not self._by_clock or not (math.isfinite(step_seconds) and step_seconds > 0):
            return
        self._steps.append(max(step_seconds - measuring_seconds, 0.0))
        if measuring_seconds > 0:
            self._costs.append(measuring_seconds)
            self.every = self._affordable()

    def _affordable(self) -> int:
        """Medians, so that a step which the machine held up does not make K jump."""
        allowed = AIM * median(self._steps)
        if not allowed > 0:
            return LARGEST_INTERVAL
        return min(max(math.ceil(self._typical_cost() / allowed), 1), LARGEST_INTERVAL)

    def _typical_cost(self) -> float:
        """The median of means over whole cycles; over single steps while there are fewer."""
        costs = list(self._costs)
        if len(costs) < _COSTS:
            return median(costs)
        return median(
            math.fsum(costs[start : start + COST_CYCLE]) / COST_CYCLE for start in range(0, _COSTS, COST_CYCLE)
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values; empty where K is given, since the step's number then says all."""
        if self._fixed is not None:
            return {}
        return {
            "last": self._last,
            "restarted": self.restarted,
            "costs": list(self._costs),
            "steps": list(self._steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, unless K is given or was given then.

        Raises:
            CheckpointError: the state is not one that `state_dict` made.
        """
        if self._fixed is not None or not state:
            return
        try:
            last, restarted = int(state["last"]), int(state["restarted"])
            costs, steps = [float(each) for each in state["costs"]], [float(each) for each in state["steps"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"state of the sampling cannot be read: {error!r}") from error
        self._last, self.restarted = last, restarted
        if self._by_clock:
            self._costs.clear()
            self._costs.extend(costs)
            self._steps.clear()
            self._steps.extend(steps)
            self.every = self._affordable() if costs and steps else 1
