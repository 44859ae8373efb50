"""How many threads a small loss is computed with: on two or three examples several are often slower than one.

On cores that others use as well, threads that wait for each other at each small operation can be ten times slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WORTH = 1.2  # times faster that all threads have to be
REPEATS = 3


@contextmanager
def useful_threads(action: Callable[[], object]) -> Iterator[None]:
    """Meanwhile one thread, unless all of this process's threads do `action` clearly faster."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    try:
        with_all = _seconds(action)
        torch.set_num_threads(1)
        if WORTH * with_all < _seconds(action):
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(action: Callable[[], object]) -> float:
    """Of the fastest of some repeats."""
    times: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)
