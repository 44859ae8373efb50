"""The contract of the gradient data plane.

A transport averages gradient buckets over ranks and, in the same pass, takes the squared norms that the
noise scale needs. It also carries one small row of float64 numbers a rank and a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future

from ddp.transport.row import ROW_LENGTH as ROW_LENGTH


@dataclass(slots=True)
class Reduction:
    """One bucket on its way: `future` holds the averaged bucket; both sums are valid once it is done.

    `own_squared_norm` is the sum of squares of this rank's bucket as handed in, `mean_squared_norm` that of
    the average, both in float64. On an accelerator they are 0-dim tensors there, so that nobody waits for it.
    """

    future: Future[Tensor]
    own_squared_norm: float | Tensor
    mean_squared_norm: float | Tensor


class Transport(ABC):
    """Averages buckets over `world_size` ranks. Calls must come in the same order on all ranks."""

    name: str
    dtypes: frozenset[torch.dtype]  # what `all_reduce_mean_` takes
    rank: int
    world_size: int

    @property
    @abstractmethod
    def wait_seconds(self) -> float:
        """Time spent waiting for other ranks so far."""

    @abstractmethod
    def all_reduce_mean_(self, bucket: Tensor, weight: float) -> Reduction:
        """Replace `bucket` on every rank by sum over ranks of weight_r * bucket_r (weights sum to 1).

        Args:
            bucket: 1-D contiguous float tensor, the same length and dtype on all ranks; may be empty.
            weight: this rank's weight; examples_r / examples for the mean over examples.

        Raises:
            PeerLostError: another rank died, left, or did not come before the deadline.
            TransportError: the ranks brought buckets of different lengths.
        """

    def complete(self) -> None:  # noqa: B027  nothing to do where a reduction is complete when it is returned
        """Wait for the buckets on their way; called after the last one of a backward. Their futures are done then.

        Raises:
            PeerLostError: as `all_reduce_mean_`.
        """

    @abstractmethod
    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give this rank's row, shape (ROW_LENGTH,), and get everyone's, shape (world_size, ROW_LENGTH)."""

    @abstractmethod
    def close(self, *, failed: bool = False) -> None:
        """Release what the transport holds; safe to call twice. Peers that wait for this rank are told at once.

        Args:
            failed: this rank has an error of its own, which is the one to show.
        """
