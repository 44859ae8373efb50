"""All-reduce through torch.distributed: gloo on CPU, NCCL on CUDA. Serves where shared memory cannot.

The squared norms cost passes of their own here, on the device that holds the gradient. On CUDA they stay
there as tensors until somebody reads them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future

from ddp.errors import PeerLostError
from ddp.transport import squares
from ddp.transport.base import ROW_LENGTH, BucketState, Reduction, Transport


class C10dTransport(Transport):
    """Any floating dtype the backend reduces.

    Args:
        group: of the gradients (None: the default group).
        control: of the rows, on CPU tensors; differs from `group` where that is NCCL alone.
    """

    name = "c10d"
    dtypes = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})

    def __init__(self, group: dist.ProcessGroup | None, control: dist.ProcessGroup | None) -> None:
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._control = group, control
        self._waited_seconds = 0.0
        self._pending: list[tuple[dist.Work, Reduction, BucketState]] = []

    @property
    def wait_seconds(self) -> float:
        return self._waited_seconds

    def prepare(self, dtypes: Iterable[torch.dtype]) -> None:
        squares.prepare(dtypes)

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        state = state or BucketState.of([bucket.numel()])
        own, state.own_squared_norms = _squared_norms(bucket, state, state.own_squared_norms)
        bucket.mul_(weight)
        try:
            work = dist.all_reduce(bucket, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error
        assert work is not None
        reduction = Reduction(bucket, own, float("nan"), Future())
        if bucket.device.type == "cpu":
            self._pending.append((work, reduction, state))
            return reduction

        def finish(done: Future[list[Tensor]]) -> Tensor:
            result = done.value()[0]  # raises where NCCL failed
            _take_mean(reduction, state)
            return result

        reduction.future = work.get_future().then(finish)
        return reduction

    def complete(self) -> None:
        """Wait in this thread for gloo's: an error is caught here and raised as itself, and no Python runs on theirs."""
        pending, self._pending = self._pending, []
        lost: PeerLostError | None = None
        for work, reduction, state in pending:
            try:
                if lost is None:
                    work.wait()
                    _take_mean(reduction, state)
            except RuntimeError as error:
                lost = self._lost(error)
                lost.__cause__ = error
            reduction.error = lost
            assert reduction.future is not None
            reduction.future.set_result(reduction.bucket)
        if lost is not None:
            raise lost

    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = [torch.empty(ROW_LENGTH, dtype=torch.float64) for _ in range(self.world_size)]
        began = time.perf_counter()
        try:
            dist.all_gather(rows, torch.from_numpy(np.ascontiguousarray(row)), group=self._control)
        except RuntimeError as error:
            raise self._lost(error) from error
        self._waited_seconds += time.perf_counter() - began
        return torch.stack(rows).numpy()

    def close(self, *, failed: bool = False) -> None:
        """Nothing of its own to release: the process group belongs to whoever made it."""

    def _lost(self, error: RuntimeError) -> PeerLostError:
        return PeerLostError(f"rank {self.rank} lost another rank in c10d: {str(error).splitlines()[0]}")


def _take_mean(reduction: Reduction, state: BucketState) -> None:
    reduction.mean_squared_norm, state.mean_squared_norms = _squared_norms(
        reduction.bucket, state, state.mean_squared_norms
    )


def _squared_norms(
    bucket: Tensor, state: BucketState, into: NDArray[np.float64] | Tensor
) -> tuple[float | Tensor, NDArray[np.float64] | Tensor]:
    """The whole bucket's sum of squares, and each parameter's: in place in `into`, or new tensors on the device."""
    if bucket.device.type == "cpu":
        assert isinstance(into, np.ndarray)
        return squares.squared_norms_(into, bucket, state.ends), into
    each = _squared_norms_on_device(bucket, np.diff(state.ends, prepend=0).tolist())
    return each.sum(), each


def _squared_norms_on_device(bucket: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each parameter's sum of squares in float64, a tensor where `bucket` is; the host waits for nothing."""
    norms = torch._foreach_norm(bucket.split(list(lengths)), 2, torch.float64)
    return torch.stack(norms).square()
