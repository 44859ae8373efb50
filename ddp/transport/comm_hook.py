"""DDP's comm hook: a gradient bucket goes to the transport, its average comes back in a future.

The hook never raises: DDP would turn an exception in a future into an unreadable cast error. It keeps the error
and gives the bucket back; `GradientExchange.take` raises it right after backward, before any optimizer step.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp.errors import UsageError
from ddp.transport.base import Reduction, Transport
from ddp.transport.c10d import C10dTransport

T = TypeVar("T")
logger = logging.getLogger("ddp.transport")


@dataclass(frozen=True, slots=True)
class GradientSums:
    """What one backward's buckets add up to."""

    own_squared_norm: float
    mean_squared_norm: float


class GradientExchange:
    """One model's gradient buckets, step by step; the state that DDP hands to `comm_hook`.

    Attributes:
        weight: this rank's weight in the mean, set before backward; 1 / world_size unless told.
        hook_seconds: time spent inside the hook so far, waiting included.
        bytes_total: gradient bytes handed to the transport so far.
    """

    def __init__(self, transport: Transport, group: dist.ProcessGroup | None = None) -> None:
        self.transport = transport
        self.weight = 1.0 / transport.world_size
        self.hook_seconds = 0.0
        self.bytes_total = 0
        self._fallback: C10dTransport | None = None
        self._group = group
        self._reductions: list[Reduction] = []
        self._complete = False
        self._error: Exception | None = None

    def reduce(self, bucket: Tensor, is_last: bool) -> Future[Tensor]:
        """Send one bucket; a new backward's first bucket drops what the previous one left."""
        began = time.perf_counter()
        if self._complete:
            self._reductions.clear()
        self._complete = is_last
        future = self.attempt(lambda: self._send(bucket))
        if is_last:
            self._complete_all()
        self.hook_seconds += time.perf_counter() - began
        return _completed(bucket) if future is None else future

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Run `action` unless something failed before; keep its error for `raise_error`."""
        if self._error is not None:
            return None
        try:
            return action()
        except Exception as error:  # kept, see the module's docstring
            self._error = error
            return None

    def raise_error(self) -> None:
        """Raise what went wrong inside the hook, if anything did."""
        if self._error is not None:
            raise self._error

    def detach(self) -> list[Reduction]:
        """The buckets of the backward that just ended, once each; their sums may still be on their way."""
        reductions, self._reductions = self._reductions, []
        return reductions

    def take(self) -> GradientSums:
        """The sums of the backward that just ended; waits for them.

        Raises:
            TransportError: whatever the transport raised inside the hook.
        """
        self.raise_error()
        return add_up(self.detach())

    def _send(self, bucket: Tensor) -> Future[Tensor]:
        if bucket.layout != torch.strided:
            raise UsageError("sparse gradients are not averaged: build the embedding with sparse=False")
        reduction = self._transport_for(bucket.dtype).all_reduce_mean_(bucket, self.weight)
        self._reductions.append(reduction)
        self.bytes_total += bucket.numel() * bucket.element_size()
        return reduction.future or _completed(bucket)

    def _complete_all(self) -> None:
        """Also after an error: DDP waits for every bucket's future."""
        for transport in filter(None, (self.transport, self._fallback)):
            try:
                transport.complete()
            except Exception as error:  # kept, see the module's docstring
                self._error = self._error or error

    def _transport_for(self, dtype: torch.dtype) -> Transport:
        if dtype in self.transport.dtypes:
            return self.transport
        if self._fallback is None:
            self._fallback = C10dTransport(self._group, self._group)
            if self.transport.rank == 0:
                logger.warning("%s gradients go through c10d: %s does not take them", dtype, self.transport.name)
        return self._fallback


def add_up(reductions: list[Reduction]) -> GradientSums:
    """The squared norms of a whole gradient from those of its buckets."""
    return GradientSums(
        sum(float(reduction.own_squared_norm) for reduction in reductions),
        sum(float(reduction.mean_squared_norm) for reduction in reductions),
    )


def comm_hook(state: GradientExchange, bucket: dist.GradBucket) -> Future[Tensor]:
    """The function that DDP calls; it insists on these names and on evaluated annotations."""
    return state.reduce(bucket.buffer(), bucket.is_last())


def register(model: DistributedDataParallel, state: object, hook: Callable[..., Future[Tensor]]) -> None:
    """Make `hook` the model's comm hook.

    Raises:
        UsageError: the model has a comm hook already; DDP allows one.
    """
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        raise UsageError(
            "this DistributedDataParallel model already has a communication hook and DDP allows only one: "
            f"remove the other register_comm_hook or ddp.attach ({str(error).splitlines()[0]})"
        ) from None


def _completed(bucket: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(bucket)
    return future
