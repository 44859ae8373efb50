"""A communication thread: buckets are averaged while backward computes the next ones.

`OverlappedTransport` runs the calls of any other transport, in order, on one daemon thread. DDP's hook only
queues a bucket and gets a future, so it never blocks; DDP waits for the futures at the end of backward. It pays where
a rank has a core to spare for the thread. The first error fails all that is queued behind it, and every
future is completed all the same: a bucket whose reduction failed says so in its `Reduction.error`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future as Answer
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future

from ddp.errors import TransportError
from ddp.transport.base import BucketState, Reduction, Transport

Rows = NDArray[np.float64]
_FAREWELL_SECONDS = 5.0  # at the end: for rows still under way, and for a call that `close` has cut short


class OverlappedTransport(Transport):
    """`inner` on a thread of its own; nobody else calls it from now on."""

    def __init__(self, inner: Transport) -> None:
        self.name, self.dtypes = inner.name, inner.dtypes
        self.rank, self.world_size = inner.rank, inner.world_size
        self._lane = _Lane(inner)
        # At exit too: the thread ends before MPI does, and before Python takes down what it runs on.
        self._end = weakref.finalize(self, self._lane.end)

    @property
    def wait_seconds(self) -> float:
        return self._lane.waited_seconds

    @property
    def exposed_seconds(self) -> float:
        return self._lane.exposed_seconds

    def prepare(self, dtypes: Iterable[torch.dtype]) -> None:
        self._lane.inner.prepare(dtypes)  # before the thread has anything to do

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        reduction = Reduction(bucket, float("nan"), float("nan"), Future())
        self._put(partial(self._lane.reduce, reduction, weight, state))
        self._lane.submitted += 1
        return reduction

    def complete(self) -> None:
        """Does not wait, nor raise: an error is in the reductions."""
        self._put(partial(self._lane.complete, time.perf_counter(), self._lane.inner.wait_seconds))

    def exchange_row(self, row: NDArray[np.float64]) -> Rows:
        answer: Answer[Rows] = Answer()
        self._put(partial(self._lane.exchange_row, row, answer, waited_for=True))
        return answer.result()

    def start_row(self, row: NDArray[np.float64]) -> Answer[Rows]:
        answer: Answer[Rows] = Answer()
        self._put(partial(self._lane.exchange_row, row.copy(), answer, waited_for=False))
        return answer

    def close(self, *, failed: bool = False) -> None:
        """Rows under way still go out; a bucket under way belongs to a backward that nobody will finish."""
        self._lane.failed = failed
        self._end()

    def _put(self, task: Callable[[], None]) -> None:
        if not self._end.alive:
            raise TransportError("the gradient exchange is closed")
        if os.getpid() != self._lane.pid:
            raise TransportError("a forked process has no part in its parent's gradient exchange")
        self._lane.tasks.put(task)


class _Lane:
    """What the thread runs and writes. Knows nothing of the transport in front, so that this can be collected."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.pid = os.getpid()
        self.tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.failed = False
        self.submitted = self._reduced = 0  # buckets; the first is the caller's, the second the thread's
        self.waited_seconds = self.exposed_seconds = 0.0
        self._error: Exception | None = None
        self._open: list[tuple[Reduction, Reduction]] = []
        self._thread = threading.Thread(target=self._run, name=f"ddp-{inner.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            task()

    def reduce(self, outer: Reduction, weight: float, state: BucketState | None) -> None:
        """`outer` takes over what the inner transport makes of its bucket."""
        inner: Reduction | None = None
        if self._error is None:
            try:
                inner = self.inner.all_reduce_mean_(outer.bucket, weight, state)
            except Exception as error:
                self._error = error
        if inner is not None and inner.future is not None:
            self._open.append((outer, inner))
        else:
            self._finish(outer, inner)

    def complete(self, asked: float, waited: float) -> None:
        """Everything before is done after this; `asked` and `waited` are of the moment when that was asked for."""
        opened, self._open = self._open, []
        try:
            self.inner.complete()
        except Exception as error:
            self._error = self._error or error
            if not any(inner.error for _, inner in opened):  # it does not say which
                for _, inner in opened:
                    inner.error = error
        exposed = time.perf_counter() - asked
        self.exposed_seconds += exposed
        self.waited_seconds += min(self.inner.wait_seconds - waited, exposed)
        for outer, inner in opened:
            self._finish(outer, inner)

    def exchange_row(self, row: NDArray[np.float64], answer: Answer[Rows], *, waited_for: bool) -> None:
        waited = self.inner.wait_seconds
        if self._error is None:
            try:
                rows = self.inner.exchange_row(row)
            except Exception as error:
                self._error = error
            else:
                if waited_for:
                    self.waited_seconds += self.inner.wait_seconds - waited
                answer.set_result(rows)
                return
        answer.set_exception(self._error)

    def end(self) -> None:
        """Called once, by whoever has the transport; the thread is gone afterwards if the inner transport lets it go."""
        if os.getpid() != self.pid:  # a forked child has no such thread, and leaves with the rank still at work
            return
        if not self.failed and self.submitted == self._reduced:
            self._join()
        self._error = self._error or TransportError("the gradient exchange was closed")
        self.inner.close(failed=self.failed)
        self._join()

    def _join(self) -> None:
        self.tasks.put(None)
        if threading.current_thread() is not self._thread:  # whose garbage collection may have come here
            self._thread.join(_FAREWELL_SECONDS)

    def _finish(self, outer: Reduction, inner: Reduction | None) -> None:
        """Also where it failed: DDP waits for every future."""
        if inner is not None:
            outer.own_squared_norm, outer.mean_squared_norm = inner.own_squared_norm, inner.mean_squared_norm
        outer.error = self._error if inner is None else inner.error
        self._reduced += 1
        assert outer.future is not None
        outer.future.set_result(outer.bucket)
