"""How much of a run's time went into steps that count: the effective training time ratio.

The time of each step counts once, when it stands in the end; steps that a restart or a roll-back takes again do not count
twice. It is held against all the time since the run first began: starting up, evaluating, saving, being down and waiting
to be started again are in it, which are what is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from ddp.telemetry.records import (
    RunEvent,
    Sink,
    StepRecord,
)

REMEMBERED_STEPS = 20_000  # that a roll-back can take out again


class Goodput(Sink):
    """A `Sink` that adds up the time of steps. What it knows of earlier parts is loaded, or recalled from `run.db`."""

    def __init__(self, began_unix_time: float) -> None:
        self.began_unix_time = began_unix_time
        self.productive_seconds = 0.0
        self.steps = 0  # the latest step whose time is in it
        self._recent: deque[tuple[int, float]] = deque(maxlen=REMEMBERED_STEPS)

    def ratio(self, unix_time: float) -> float:
        """Productive time as a share of all time up to `unix_time`; 0 to 1."""
        return ratio(self.productive_seconds, unix_time - self.began_unix_time)

    def step(self, record: StepRecord) -> None:
        self.productive_seconds += record.duration_seconds
        self.steps = record.step
        self._recent.append((record.step, record.duration_seconds))

    def event(self, record: RunEvent) -> None:
        if record.kind == "rolled_back":
            self._forget_after(record.step)

    def recall(self, began_unix_time: float, productive_seconds: float, steps: int) -> None:
        """Go on from what an earlier part of the run left; the earlier beginning counts."""
        self.began_unix_time = min(self.began_unix_time, began_unix_time)
        self._forget_after(steps)
        self.productive_seconds, self.steps = productive_seconds, steps

    def state_dict(self) -> dict[str, float]:
        return {
            "productive_seconds": self.productive_seconds,
            "began_unix_time": self.began_unix_time,
            "steps": float(self.steps),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """What a checkpoint holds, after a restart and after a roll-back alike."""
        self.recall(state["began_unix_time"], state["productive_seconds"], int(state["steps"]))

    def _forget_after(self, step: int) -> None:
        while self._recent and self._recent[-1][0] > step:
            self.productive_seconds -= self._recent.pop()[1]
        self.steps = min(self.steps, step)


def ratio(productive_seconds: float, seconds: float) -> float:
    """Within 0 and 1, also where a clock was set."""
    return min(max(productive_seconds / seconds, 0.0), 1.0) if seconds > 0 else 0.0
