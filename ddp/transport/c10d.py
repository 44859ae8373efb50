"""All-reduce through torch.distributed: gloo on CPU, NCCL on CUDA. Serves where shared memory cannot.

The squared norms cost a pass of their own here, on the device that holds the gradient. On CUDA they stay
there as tensors until somebody reads them.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future

from ddp.errors import PeerLostError
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
        self._pending: list[tuple[dist.Work, Tensor, Reduction]] = []

    @property
    def wait_seconds(self) -> float:
        return self._waited_seconds

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        own = squared_norm(bucket)
        bucket.mul_(weight)
        try:
            work = dist.all_reduce(bucket, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error
        assert work is not None
        reduction = Reduction(bucket, own, float("nan"), Future())
        if bucket.device.type == "cpu":
            self._pending.append((work, bucket, reduction))
            return reduction

        def finish(done: Future[list[Tensor]]) -> Tensor:
            result = done.value()[0]
            reduction.mean_squared_norm = squared_norm(result)
            return result

        reduction.future = work.get_future().then(finish)
        return reduction

    def complete(self) -> None:
        """Wait in this thread for gloo's: an error is caught here and raised as itself, and no Python runs on theirs."""
        pending, self._pending = self._pending, []
        try:
            for work, bucket, reduction in pending:
                work.wait()
                reduction.mean_squared_norm = squared_norm(bucket)
        except RuntimeError as error:
            raise self._lost(error) from error
        finally:
            for _, bucket, reduction in pending:
                assert reduction.future is not None
                reduction.future.set_result(bucket)

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


def squared_norm(tensor: Tensor) -> float | Tensor:
    """Sum of squares in float64: a float for a CPU tensor, else a 0-dim tensor on its device."""
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return float(norm) ** 2 if tensor.device.type == "cpu" else norm.square()
