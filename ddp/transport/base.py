"""The contract of the gradient data plane.

A transport averages gradient buckets over ranks and, in the same pass, takes the squared norms that the
noise scale needs. It also carries one small row of float64 numbers a rank and a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future as Answer
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future

from ddp.transport.row import ROW_LENGTH as ROW_LENGTH


@dataclass(slots=True, eq=False)
class BucketState:
    """What one bucket of a model keeps from step to step; made by whoever knows the bucket's parameters.

    Attributes:
        ends: shape (parameters,), int64: where each parameter's elements end in the bucket.
        own_squared_norms, mean_squared_norms: shape (parameters,), float64: each parameter's sum of squares in
            this rank's bucket as handed in, and in the average; of the newest reduction, once that is done.
            On an accelerator tensors there, so that nobody waits for it.
        kept: what a transport keeps for this bucket under a name of its own, such as what quantising left over.
    """

    ends: NDArray[np.int64]
    own_squared_norms: NDArray[np.float64] | Tensor
    mean_squared_norms: NDArray[np.float64] | Tensor
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        """For a bucket of parameters with so many elements each, in the bucket's order."""
        return cls(np.cumsum(lengths, dtype=np.int64), np.zeros(len(lengths)), np.zeros(len(lengths)))


@dataclass(slots=True)
class Reduction:
    """One bucket on its way to its average; all but `bucket` is valid once it is done.

    Attributes:
        bucket: what was handed in, and holds the average in the end.
        own_squared_norm: the sum of squares of this rank's bucket as handed in, in float64.
        mean_squared_norm: that of the average. On an accelerator both are 0-dim tensors there.
        future: None where the reduction was done when it was returned; else it gives `bucket`, also after an error.
        error: what went wrong on the way, where that was not raised at once.
        projection: of this rank's bucket as handed in, shape (DIRECTIONS,), where it has one; from whoever handed it
            in, see `ddp.transport.projection`.
    """

    bucket: Tensor
    own_squared_norm: float | Tensor
    mean_squared_norm: float | Tensor
    future: Future[Tensor] | None = None
    error: Exception | None = None
    projection: Tensor | None = None


class Transport(ABC):
    """Averages buckets over `world_size` ranks. Calls must come in the same order on all ranks."""

    name: str
    dtypes: frozenset[torch.dtype]  # what `all_reduce_mean_` takes
    rank: int
    world_size: int

    @property
    @abstractmethod
    def wait_seconds(self) -> float:
        """Time spent waiting for other ranks so far, as far as it held up whoever called."""

    @property
    def exposed_seconds(self) -> float:
        """Time so far from `complete` to the last average, where `complete` does not wait for that itself."""
        return 0.0

    @abstractmethod
    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        """Replace `bucket` on every rank by sum over ranks of weight_r * bucket_r (weights sum to 1).

        Args:
            bucket: 1-D contiguous float tensor, the same length and dtype on all ranks; may be empty.
            weight: this rank's weight; examples_r / examples for the mean over examples.
            state: the bucket's; its sums per parameter are written.

        Raises:
            PeerLostError: another rank died, left, or did not come before the deadline.
            TransportError: the ranks brought buckets of different lengths.
        """

    def prepare(self, dtypes: Iterable[torch.dtype]) -> None:  # noqa: B027  nothing to do where nothing is compiled
        """Get ready for buckets of these dtypes, outside any deadline."""

    def complete(self) -> None:  # noqa: B027  nothing to do where a reduction is complete when it is returned
        """Called after the last bucket of a backward: from here on all futures will be done without further calls.

        Raises:
            PeerLostError: as `all_reduce_mean_`.
        """

    @abstractmethod
    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give this rank's row, shape (ROW_LENGTH,), and get everyone's, shape (world_size, ROW_LENGTH)."""

    def start_row(self, row: NDArray[np.float64]) -> Answer[NDArray[np.float64]]:
        """As `exchange_row`, whose answer or error comes later where a thread of the transport's own can fetch it."""
        answer: Answer[NDArray[np.float64]] = Answer()
        answer.set_result(self.exchange_row(row))
        return answer

    @abstractmethod
    def close(self, *, failed: bool = False) -> None:
        """Release what the transport holds; safe to call twice. Peers that wait for this rank are told at once.

        A call that another thread is in ends soon after, with an error.

        Args:
            failed: this rank has an error of its own, which is the one to show.
        """
