"""Where a rank's time goes in one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """One step of one rank. `all_reduce` and `wait` split what the averaging and the row took.

    `measure` is from the row to the optimizer: what is made of the gradients. It is none of the phases of a record.
    """

    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    all_reduce: float = 0.0
    wait: float = 0.0
    optimizer: float = 0.0
    measure: float = 0.0


class PhaseClock:
    """A stopwatch that is told when a phase ends; one object a step.

    Args:
        enter: told the phase that begins, where that is known.
    """

    def __init__(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        self._enter = enter
        enter("data")
        self._began = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str, then: str | None = None) -> None:
        """Add the time since the last call to `phase`; `then` is what begins now."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
        if then is not None:
            self._enter(then)

    @property
    def elapsed_seconds(self) -> float:
        """Since this clock was made."""
        return time.perf_counter() - self._began

    def seconds(self, *, hook_seconds: float, wait_seconds: float) -> PhaseSeconds:
        """The phases so far; the hook's time is taken out of backward, in which it ran."""
        lap = self._seconds.get
        in_backward = min(hook_seconds, lap("backward", 0.0))  # a thread's clock may count a moment twice
        communication = in_backward + lap("exchange", 0.0)
        return PhaseSeconds(
            data=lap("data", 0.0),
            forward=lap("forward", 0.0),
            backward=lap("backward", 0.0) - in_backward,
            all_reduce=max(0.0, communication - wait_seconds),
            wait=min(wait_seconds, communication),
            optimizer=lap("optimizer", 0.0),
            measure=lap("measure", 0.0),
        )
