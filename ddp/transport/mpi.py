"""All-reduce by messages between any ranks of one world of MPI: the direct exchange over an MPI mailbox.

MPI only carries bytes, so all that it cannot add (bfloat16, float16, wire formats) works as anything else does, sums
have a fixed order, and a rank that stays away is named instead of hanging the others.
"""

from __future__ import annotations

import os

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ddp.transport import codec
from ddp.transport.base import ROW_LENGTH, BucketState, Reduction, Transport
from ddp.transport.direct import DirectExchange
from ddp.transport.mailbox import Mailbox, MpiMailbox
from ddp.transport.pieces import KINDS, Bucket, begin_squares, pieces_of

_SMALLEST_PIECE_BYTES, _LARGEST_PIECE_BYTES = 512 << 10, 16 << 20
_SHARE_BYTES = 128 << 10  # with many ranks pieces grow, so that messages stay worth their latency


class MpiTransport(Transport):
    """Ranks of one mpirun.

    Args:
        group: of the ranks, on CPU tensors (None: the default group); used to set up only.
        timeout_seconds: how long a rank may stay away before the others give it up.
        wire: a wire format of `codec.FORMATS`.
        mailbox: what carries the messages, if not MPI.
        piece_bytes: how much of a bucket is on its way at a time, if not chosen by the number of ranks.
    """

    name = "mpi"
    dtypes = frozenset(KINDS)

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout_seconds: float,
        wire: str = "gradient",
        mailbox: Mailbox | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        self._mailbox = mailbox or MpiMailbox(group, timeout_seconds)
        self.rank, self.world_size = self._mailbox.rank, self._mailbox.world_size
        self._wires = {dtype: codec.wire_kind(wire, own) for dtype, own in KINDS.items()}
        self._piece_bytes = piece_bytes or piece_bytes_for(self.world_size)
        self._exchange = DirectExchange(self._mailbox, range(self.world_size), self._piece_bytes)
        self._closed, self._pid = False, os.getpid()

    @property
    def wait_seconds(self) -> float:
        return self._mailbox.wait_seconds

    @property
    def wire_bytes_total(self) -> int:
        """Bytes of messages that this rank has sent to other nodes."""
        return self._mailbox.bytes_to_other_hosts()

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        own, length = KINDS[bucket.dtype], bucket.numel()
        self._mailbox.subject = f"{length} elements"
        begin_squares(state, length)
        count, piece = pieces_of(bucket.data_ptr(), length, codec.ELEMENT_BYTES[own], self._piece_bytes)
        sums = self._exchange.run(Bucket(own, self._wires[bucket.dtype], length, weight, state), count, piece)
        return Reduction(bucket, *sums)

    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        row = np.ascontiguousarray(row, dtype=np.float64)
        if row.shape != (ROW_LENGTH,):
            raise ValueError(f"a row holds {ROW_LENGTH} numbers, not {row.shape}")
        self._mailbox.subject = "the step's row"
        return self._exchange.exchange_row(row)

    def close(self, *, failed: bool = False) -> None:
        if self._closed or os.getpid() != self._pid:  # a forked child leaves with the rank still at work
            return
        self._closed = True
        self._mailbox.close(failed=failed)


def piece_bytes_for(members: int) -> int:
    """How much of a bucket `members` ranks exchange at a time."""
    return max(_SMALLEST_PIECE_BYTES, min(_LARGEST_PIECE_BYTES, members * _SHARE_BYTES))
