"""Names a rank that is slow by itself, step after step: numbers in, a verdict out.

A rank's own time is its way to the last gradient without waiting: data, forward, backward. What a rank waits for is the
others' doing, so the slow one is the one that does not wait. One slow step says nothing (a collector of garbage, another
process, a page that compiles); half a window of them does, which the median over the window tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddp.telemetry.records import RunEvent

WINDOW_STEPS = 25
JUDGED_EVERY_STEPS = 5  # a judgement takes tens of microseconds, as long as some steps' data
NAMED_ABOVE = 1.25  # of the others' median
NAMED_ABOVE_SECONDS = 0.002  # and at least so much longer
NAMED_SHARE = 0.8  # of the window's steps in which it was slower than the others' median
LET_GO_BELOW = 1.15
CONFIRMATIONS = 5  # judgements in a row that agree: the last window shares nothing but a few steps with the first


@dataclass(frozen=True, slots=True)
class Slowest:
    """The rank with the longest own time over the window, and what the others take."""

    rank: int
    own_seconds: float  # median over the window
    others_seconds: float  # median over the other ranks of the same

    @property
    def ratio(self) -> float:
        """How many times as long it takes; 1 where nothing is measurable."""
        return self.own_seconds / self.others_seconds if self.others_seconds > 0 else math.inf

    def in_words(self) -> str:
        own, others = 1000 * self.own_seconds, 1000 * self.others_seconds
        return f"rank {self.rank} takes {own:.3g} ms to its last gradient where the others take {others:.3g}"


class StragglerWatch:
    """Fed with every step's own times of all ranks; `rank` is the straggler, -1 while there is none."""

    def __init__(self, world_size: int) -> None:
        self._own_seconds = np.zeros((WINDOW_STEPS, world_size))
        self._steps = 0
        self._agreed = 0  # judgements in a row for the candidate
        self._candidate = -1
        self.rank = -1
        self.slowest: Slowest | None = None  # None until a window is full

    @property
    def slowdown_ratio(self) -> float:
        """The slowest rank's, named or not; NaN until it is known."""
        return math.nan if self.slowest is None else self.slowest.ratio

    def observe(self, own_seconds: Sequence[float]) -> Slowest | None:
        """Enter one step, one time a rank; the news where a rank is named or the named one is no straggler any more.

        `rank` says which of the two it is.
        """
        if len(own_seconds) < 2 or not all(seconds > 0 for seconds in own_seconds):  # a first row has no times
            return None
        self._own_seconds[self._steps % WINDOW_STEPS] = own_seconds
        self._steps += 1
        if self._steps < WINDOW_STEPS or self._steps % JUDGED_EVERY_STEPS:
            return None
        return self._judge()

    def _judge(self) -> Slowest | None:
        self.slowest = self._of_rank(int(np.argmax(np.median(self._own_seconds, axis=0))))
        candidate = self._straggling(self.slowest)
        self._agreed = self._agreed + 1 if candidate == self._candidate else 1
        self._candidate = candidate
        if candidate == self.rank or self._agreed < CONFIRMATIONS:
            return None
        before, self.rank = self.rank, candidate
        return self.slowest if candidate >= 0 else self._of_rank(before)

    def _of_rank(self, rank: int) -> Slowest:
        medians = np.median(self._own_seconds, axis=0)
        return Slowest(rank, float(medians[rank]), float(np.median(np.delete(medians, rank))))

    def _straggling(self, slowest: Slowest) -> int:
        """The rank that this window speaks against; one that is named already keeps its name for longer."""
        rank, least_ratio = slowest.rank, LET_GO_BELOW if slowest.rank == self.rank else NAMED_ABOVE
        others = np.median(np.delete(self._own_seconds, rank, axis=1), axis=1)
        longer = slowest.own_seconds - slowest.others_seconds
        share = float(np.mean(self._own_seconds[:, rank] > others))
        if slowest.ratio > least_ratio and longer > NAMED_ABOVE_SECONDS and share >= NAMED_SHARE:
            return rank
        return -1


def straggler_event(watch: StragglerWatch, news: Slowest, step: int, unix_time: float) -> RunEvent:
    """What `observe` has just told, for the sinks."""
    if watch.rank >= 0:
        return RunEvent(step, unix_time, "straggler", news.rank, news.in_words())
    return RunEvent(step, unix_time, "straggler_over", news.rank, f"no straggler any more: {news.in_words()}")
