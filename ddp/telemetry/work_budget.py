"""A bound on the processor time of one thread, as a share of the time that passes.

The metrics endpoint lives in the process of rank 0. Whatever strangers send it, and however fast, the work that they
cause stays below a share of one core: what counts is measured work, so that a handshake costs what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.01  # of one core
BURST_SECONDS = 0.05  # of work without a pause: a scrape and its handshake are served at once
SLICE_SECONDS = 0.001  # of work that has to be there before the thread goes on: fewer, longer pauses


class WorkBudget:
    """Work that the thread may do now. Its own thread's: made, asked and spent there."""

    def __init__(
        self,
        share: float = SHARE,
        clock: Callable[[], float] = time.monotonic,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        self._share, self._clock, self._worked = share, clock, worked
        self._left_seconds = BURST_SECONDS
        self._seen, self._seen_work = clock(), worked()

    def pause_seconds(self) -> float:
        """How long to do nothing before the next piece of work; 0 where there is work left."""
        now, work = self._clock(), self._worked()
        self._left_seconds += self._share * (now - self._seen) - (work - self._seen_work)
        self._left_seconds = min(self._left_seconds, BURST_SECONDS)
        self._seen, self._seen_work = now, work
        return 0.0 if self._left_seconds > 0 else (SLICE_SECONDS - self._left_seconds) / self._share
