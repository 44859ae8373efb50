"""The direct exchange: a weighted sum over some ranks of a mailbox, piece by piece, bit-identical on all of them.

Of a piece each member owns a share. Everyone sends each owner its share; the owner adds them in the members' order
and sends the sum to all: a rank sends and receives 2 (M - 1) / M of the piece. Two members swap whole pieces
instead and both add, which is as many bytes and one latency less; so do more of them with small pieces. Every rank, the
owner too, takes what arrives of a sum, so all hold the same bits and the same squares.

The schedule is static: a few pieces are begun before the first is added up, and a few more before it is finished, so that
the wire is busy. Buffers are kept from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp.errors import TransportError
from ddp.transport import codec, message
from ddp.transport.mailbox import Bytes, Mailbox
from ddp.transport.pieces import NOTHING, Bucket, Piece

AHEAD = 2
_SMALL_BYTES = 32 * 1024
_TERMS, _SUMS, _ROWS = 0, 1, 2  # tags
_ALIGNMENT = 64


class _Box:
    """Room for a number of messages."""

    def __init__(self, count: int, stride: int) -> None:
        self._memory = np.empty(count * stride + _ALIGNMENT, np.uint8)
        self._stride = stride
        self._address = self._memory.ctypes.data

    def address(self, index: int) -> int:
        return self._address + index * self._stride

    def space(self, index: int, size: int | None = None) -> Bytes:
        start = index * self._stride
        return self._memory[start : start + (self._stride if size is None else size)]


@dataclass(slots=True)
class _Slot:
    """One piece on its way, its buffers by member, and what was begun with them, by peer."""

    out: _Box
    terms: _Box
    sums: _Box
    bucket: Bucket | None = None
    piece: Piece = NOTHING
    awaited_terms: list[tuple[int, Any]] = field(default_factory=list)
    awaited_sums: list[tuple[int, Any]] = field(default_factory=list)
    sends: list[tuple[int, Any]] = field(default_factory=list)


class DirectExchange:
    """Among `members`, ranks of `mailbox` in the order in which their numbers are added.

    Args:
        piece_bytes: the most that the numbers of a piece take.
        ahead: pieces begun before the oldest is added up, and as many added up before the oldest is finished.

    Attributes:
        places: how many pieces may be on their way at once.
    """

    def __init__(self, mailbox: Mailbox, members: Sequence[int], piece_bytes: int, ahead: int = AHEAD) -> None:
        self._mailbox, self._members = mailbox, list(members)
        self._count, self._me = len(members), list(members).index(mailbox.rank)
        peers = [(index, rank) for index, rank in enumerate(members) if rank != mailbox.rank]
        self._peers = peers[self._me :] + peers[: self._me]  # so that not all send to the same one first
        self._ahead = ahead
        self.places = (1 if self._count <= 2 else 2) * ahead + 1
        whole = _aligned(message.HEADER_BYTES + piece_bytes)
        self._share_bytes = _aligned(message.HEADER_BYTES + piece_bytes // self._count)
        room = whole if self._count <= 2 else self._share_bytes
        sums = 0 if self._count <= 2 else self._count
        self._slots = [
            _Slot(_Box(self._count, room), _Box(self._count, room), _Box(sums, self._share_bytes))
            for _ in range(self.places)
        ]
        self._workspace = np.zeros(message.WORKSPACE_BYTES, np.uint8)
        self._workspace_address = self._workspace.ctypes.data
        self._addresses = np.zeros(self._count, np.int64)
        self._addresses_address = self._addresses.ctypes.data

    def run(
        self, bucket: Bucket, count: int, piece: Callable[[int], Piece], finished: Callable[[int], None] | None = None
    ) -> tuple[float, float]:
        """Replace the numbers of `count` pieces by their weighted sums over the members.

        Args:
            piece: makes piece k ready; called in order, some pieces ahead.
            finished: called with k once piece k holds its sum, in order.

        Returns:
            The sums of squares of the own numbers and of the sums.

        Raises:
            PeerLostError: a member did not come.
            TransportError: a member brought a bucket of another length.
        """
        own = mean = 0.0
        swap = self._count <= 2 or (count == 1 and self._is_small(bucket))
        ahead = min(self._ahead, count)
        lag = ahead if swap else 2 * ahead
        for step in range(count + lag):
            if step < count:
                own += self._begin(self._slots[step % self.places], bucket, piece(step), swap)
            if not swap and 0 <= step - ahead < count:
                self._add(self._slots[(step - ahead) % self.places])
            if step >= lag:
                mean += self._finish(self._slots[(step - lag) % self.places], swap)
                if finished:
                    finished(step - lag)
        self.settle()  # MPI sends only while it is asked, and the caller may go on to wait for a peer elsewhere
        return own, mean

    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every member's row, in their order; all rows are of one length."""
        rows = np.empty((self._count, len(row)))
        rows[self._me] = row
        spaces = rows.view(np.uint8)
        receives = [(peer, self._mailbox.post_receive(peer, spaces[index], _ROWS)) for index, peer in self._peers]
        sends = [(peer, self._mailbox.post_send(peer, spaces[self._me], _ROWS)) for _, peer in self._peers]
        for peer, handle in (*receives, *sends):
            self._mailbox.wait(peer, handle)
        return rows

    def settle(self) -> None:
        """Wait until everything sent has left, so that the mailbox can be closed."""
        for slot in self._slots:
            self._await(slot.sends)

    def _is_small(self, bucket: Bucket) -> bool:
        """Whether it is swapped among more than two: only in its own format, or a swap would round otherwise."""
        size = message.message_bytes(bucket.wire, bucket.length)
        return bucket.wire == bucket.own and size <= min(_SMALL_BYTES, self._share_bytes)

    def _begin(self, slot: _Slot, bucket: Bucket, piece: Piece, swap: bool) -> float:
        """Send the own numbers, to everyone or to each owner its share; returns their sum of squares."""
        self._await(slot.sends)  # the buffers are still theirs
        slot.bucket, slot.piece = bucket, piece
        mailbox = self._mailbox
        slot.awaited_terms = [
            (peer, mailbox.post_receive(peer, slot.terms.space(index), _TERMS)) for index, peer in self._peers
        ]
        if swap:
            own = self._encode(slot, self._me, piece)
            size = message.message_bytes(bucket.wire, piece.length)
            content = slot.out.space(self._me, size)
            slot.sends = [(peer, mailbox.post_send(peer, content, _TERMS)) for _, peer in self._peers]
            return own
        slot.awaited_sums = [
            (peer, mailbox.post_receive(peer, slot.sums.space(index), _SUMS)) for index, peer in self._peers
        ]
        own = self._encode(slot, self._me, self._share(slot, self._me))
        for index, peer in self._peers:
            share = self._share(slot, index)
            own += self._encode(slot, index, share)
            content = slot.out.space(index, message.message_bytes(bucket.wire, share.length))
            slot.sends.append((peer, mailbox.post_send(peer, content, _TERMS)))
        return own

    def _add(self, slot: _Slot) -> None:
        """As owner: add up everyone's numbers of the own share, and send the sum to all."""
        self._await(slot.awaited_terms)
        bucket, share = slot.bucket, self._share(slot, self._me)
        assert bucket is not None
        self._reduce(slot, share, slot.sums.address(self._me))
        content = slot.sums.space(self._me, message.message_bytes(bucket.wire, share.length))
        slot.sends += [(peer, self._mailbox.post_send(peer, content, _SUMS)) for _, peer in self._peers]

    def _finish(self, slot: _Slot, swap: bool) -> float:
        """Take the sums, in the order of their owners on every rank; returns their sum of squares."""
        if swap:
            self._await(slot.awaited_terms)
            return self._reduce(slot, slot.piece, 0)
        self._await(slot.awaited_sums)
        return sum(self._take(slot, index) for index in range(self._count))

    def _share(self, slot: _Slot, index: int) -> Piece:
        assert slot.bucket is not None
        return slot.piece.share(index, self._count, codec.ELEMENT_BYTES[slot.bucket.own])

    def _encode(self, slot: _Slot, index: int, part: Piece) -> float:
        bucket = slot.bucket
        assert bucket is not None
        return message.encode(
            bucket.own,
            part.address,
            part.length,
            bucket.weight,
            bucket.wire,
            slot.out.address(index),
            bucket.length,
            bucket.residual("sent", part),
            self._workspace_address,
            *bucket.squares_at(part, own=True),
        )

    def _reduce(self, slot: _Slot, part: Piece, result: int) -> float:
        """Add the members' messages into `part` and, as owner, into a message at `result`."""
        bucket = slot.bucket
        assert bucket is not None
        for index in range(self._count):
            self._addresses[index] = (slot.out if index == self._me else slot.terms).address(index)
        squares = bucket.squares_at(part, own=False) if result == 0 else message.NO_SQUARES
        total = message.reduce(
            bucket.wire,
            self._addresses_address,
            self._count,
            bucket.own,
            part.address,
            part.length,
            bucket.wire if result else message.NO_RESULT,
            result,
            bucket.length,
            bucket.residual("sums", part) if result else 0,
            self._workspace_address,
            *squares,
        )
        self._check(total, bucket, lambda index: slot.out if index == self._me else slot.terms)
        return total

    def _take(self, slot: _Slot, index: int) -> float:
        """Write an owner's sum where it belongs; returns its sum of squares."""
        bucket, part = slot.bucket, self._share(slot, index)
        assert bucket is not None
        self._addresses[0] = slot.sums.address(index)
        total = message.reduce(
            bucket.wire,
            self._addresses_address,
            1,
            bucket.own,
            part.address,
            part.length,
            message.NO_RESULT,
            0,
            bucket.length,
            0,
            self._workspace_address,
            *bucket.squares_at(part, own=False),
        )
        self._check(total, bucket, lambda index: slot.sums)
        return total

    def _check(self, total: float, bucket: Bucket, box: Callable[[int], _Box]) -> None:
        if total != message.ANOTHER_BUCKET:
            return
        for index, rank in enumerate(self._members):
            length = int(box(index).space(index, message.HEADER_BYTES)[8:].view(np.int64)[0])
            if length != bucket.length:
                raise TransportError(
                    f"rank {self._mailbox.rank} brought {bucket.length} elements to the all-reduce, rank {rank} {length}: "
                    "the ranks do not run the same model or not in the same order"
                )

    def _await(self, pending: list[tuple[int, Any]]) -> None:
        wait = self._mailbox.wait
        for peer, handle in pending:
            wait(peer, handle)
        pending.clear()


def _aligned(size: int) -> int:
    return -(-(size + _ALIGNMENT) // _ALIGNMENT) * _ALIGNMENT
