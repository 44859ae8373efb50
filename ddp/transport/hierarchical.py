"""All-reduce over several nodes: through shared memory inside a node, by messages between nodes.

A piece of a bucket is reduced inside each node so that every local rank holds a slice of the node's weighted sum. Each local
rank then exchanges its slice with the same-numbered ranks of the other nodes, all of them at once, and
the slices of the mean are shared inside the node again. A node's link carries each number once per stage, whatever
the number of ranks behind it. Some pieces are on the wire while the next is reduced.

Sums are in float32 (float64 for float64), in rank order inside a node and in node order between them, so all ranks hold
the same bits in every run and for any split into buckets.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ddp.errors import TransportError
from ddp.transport import codec
from ddp.transport.base import ROW_LENGTH, BucketState, Reduction, Transport
from ddp.transport.direct import AHEAD, DirectExchange
from ddp.transport.mailbox import C10dMailbox, Mailbox
from ddp.transport.mpi import piece_bytes_for
from ddp.transport.nodes import gather, nodes
from ddp.transport.pieces import KINDS, Bucket, Piece, begin_squares
from ddp.transport.ring import CHUNK_BYTES, attach_segment
from ddp.transport.shared_memory import SharedMemoryTransport

GRACE_SECONDS = 2.0  # a peer whose own node lacks a rank names that rank first


class HierarchicalTransport(Transport):
    """Ranks of several nodes, as many on each.

    Args:
        group: of the ranks, on CPU tensors (None: the default group).
        timeout_seconds: how long a rank may stay away before the others give it up.
        wire: between nodes, a wire format of `codec.FORMATS`.
        layout: the ranks by node, if not to be found out.
        slice_bytes: how much of a slice is on its way at a time, if not chosen by the number of nodes.
        ahead: pieces on the wire before the oldest is waited for, see `DirectExchange`.
        mailbox: what carries the messages between nodes, if not gloo. Its thread keeps the link busy while this one
            waits inside the node; MPI makes progress only while it is polled.

    Raises:
        TransportError: on all ranks, where nodes have different numbers of ranks or memory cannot be shared.
    """

    name = "hierarchical"
    dtypes = frozenset(KINDS)

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout_seconds: float,
        wire: str = "gradient",
        layout: Sequence[Sequence[int]] | None = None,
        slice_bytes: int | None = None,
        ahead: int = AHEAD,
        mailbox: Mailbox | None = None,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.layout = [list(ranks) for ranks in (layout or nodes(group))]
        if len({len(ranks) for ranks in self.layout}) != 1:
            raise TransportError(f"nodes have different numbers of ranks: {[len(ranks) for ranks in self.layout]}")
        local = next(ranks for ranks in self.layout if self.rank in ranks)
        self._local_rank, self._local_size = local.index(self.rank), len(local)
        self._shared = _share(local, group, timeout_seconds)
        self._mailbox = mailbox or C10dMailbox(group, timeout_seconds, GRACE_SECONDS)
        if self._local_size > 1:
            self._mailbox.waits_for = self._shared.waits_for
        peers = [ranks[self._local_rank] for ranks in self.layout]
        self._wires = {dtype: codec.wire_kind(wire, own) for dtype, own in KINDS.items()}
        self._lengths = {
            dtype: self._piece_length(dtype, slice_bytes or 2 * piece_bytes_for(len(peers))) for dtype in KINDS
        }
        room = max(self._slices_bytes(length, dtype) for dtype, length in self._lengths.items())
        self._exchange = DirectExchange(self._mailbox, peers, room, ahead)
        self._slices = torch.empty((self._exchange.places, -(-room // 8) * 8), dtype=torch.uint8)
        self._whole = BucketState.of([1 << 62])  # of whoever has no state: one parameter that never ends
        self._closed, self._pid = False, os.getpid()

    @property
    def wait_seconds(self) -> float:
        return self._shared.wait_seconds + self._mailbox.wait_seconds

    @property
    def wire_bytes_total(self) -> int:
        """Bytes of messages that this rank has sent to other nodes."""
        return sum(self._mailbox.sent_bytes)

    def prepare(self, dtypes: Iterable[torch.dtype]) -> None:
        self._shared.prepare_halves(dtypes)

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        length, size, sums = bucket.numel(), self._lengths[bucket.dtype], self._shared.sum_dtype(bucket.dtype)
        self._mailbox.subject = f"{length} elements"
        begin_squares(state, length)
        inside = self._whole if state is None else state
        each = self._shared.slices_length(size, bucket.dtype)
        slices, held = self._slices.view(sums), dict[int, Tensor]()
        own = mean = 0.0

        def reduce_inside(index: int) -> Piece:
            nonlocal own
            part = bucket[index * size : (index + 1) * size]
            held[index] = slices[index % self._exchange.places, : self._shared.slices_length(part.numel(), part.dtype)]
            own += self._shared.reduce_scatter(part, weight, held[index], inside, index * size)
            return Piece(held[index].data_ptr(), held[index].numel(), index * each)

        def spread_inside(index: int) -> None:
            nonlocal mean
            part = bucket[index * size : (index + 1) * size]
            mean += self._shared.all_gather(held.pop(index), part, inside, index * size)

        plan = Bucket(KINDS[sums], self._wires[bucket.dtype], length, 1.0, state, measured=False)
        self._exchange.run(plan, max(1, -(-length // size)), reduce_inside, spread_inside)
        return Reduction(bucket, own, mean)

    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inside the node first, then each rank with its peers: nothing needs to be spread after that."""
        own_node = self._shared.exchange_row(row)
        self._mailbox.subject = "the step's row"
        by_node = self._exchange.exchange_row(own_node.ravel())
        rows = np.empty((self.world_size, ROW_LENGTH))
        rows[np.ravel(self.layout)] = by_node.reshape(self.world_size, ROW_LENGTH)
        return rows

    def _piece_length(self, dtype: torch.dtype, slice_bytes: int) -> int:
        """Elements of a piece that leaves each local rank about `slice_bytes` of sums, in whole chunks where it can."""
        length = slice_bytes // self._shared.sum_dtype(dtype).itemsize * self._local_size
        chunk = CHUNK_BYTES // dtype.itemsize
        return max(length // chunk * chunk, length if length < chunk else 0)

    def _slices_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Room for the slices of a piece of so many elements, or fewer."""
        return self._shared.largest_slices_length(length, dtype) * self._shared.sum_dtype(dtype).itemsize

    def close(self, *, failed: bool = False) -> None:
        if self._closed or os.getpid() != self._pid:  # a forked child leaves with the rank still at work
            return
        self._closed = True
        self._shared.close(failed=failed)
        self._mailbox.close(failed=failed)


def _share(local: list[int], group: dist.ProcessGroup | None, timeout_seconds: float) -> SharedMemoryTransport:
    """This node's shared memory. Collective over all nodes, and refused on all where one cannot have it."""
    segment, refusal = None, ""
    if len(local) > 1:
        try:
            segment = attach_segment(_group_of(local, group))
        except TransportError as error:
            refusal = str(error)
    refused = gather(np.array([int(bool(refusal))]), group)[:, 0]
    if refused.any():
        raise TransportError(refusal or f"rank {int(refused.argmax())} cannot share its node's memory")
    return SharedMemoryTransport(segment, local.index(dist.get_rank(group)), len(local), timeout_seconds, names=local)


def _group_of(local: list[int], group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
    made = dist.new_group([everyone[rank] for rank in local], backend="gloo", use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)  # never the non-member's number
