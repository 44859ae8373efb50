"""A thread that does jobs in order at a low priority, so that the step goes before what is behind it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

# Not the lowest: at 19 a thread that was given the interpreter's lock may wait for a core while the step waits for the
# lock, up to 0.6 s on busy cores. At 10 the longest step beside it was 37 ms, of 25 without it, on one core at about a
# tenth of which it wrote (`benchmarks/checkpoint_stall.py`).
PRIORITY = 10


class Background:
    """The thread starts with the first job. A job that raises does not end it: its future has the error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, action: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._jobs.put((future, action))
        return future

    def close(self, timeout_seconds: float) -> bool:
        """Let the thread end after the jobs that it has; whether it did in time."""
        if self._thread is None:
            return True
        self._jobs.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with suppress(OSError, AttributeError):  # a thread's own on Linux alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PRIORITY)
        while (job := self._jobs.get()) is not None:
            future, action = job
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)
            del job, future, action  # what they hold need not wait for the next job
