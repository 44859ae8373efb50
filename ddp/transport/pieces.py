"""Buckets and their pieces, as the exchanges that send messages see them: kinds, addresses, positions, squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ddp.transport import codec, message
from ddp.transport.base import BucketState

KINDS = {
    torch.float64: codec.FLOAT64,
    torch.float32: codec.FLOAT32,
    torch.bfloat16: codec.BFLOAT16,
    torch.float16: codec.FLOAT16,
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """What all pieces of one reduction have in common.

    Attributes:
        own: the kind of the numbers handed in and given back; `wire`: the kind that travels.
        length: elements of the whole bucket.
        weight: of this rank's numbers.
        state: keeps what quantising leaves out, and gets the squares by parameter.
        measured: whether squares are summed here.
    """

    own: int
    wire: int
    length: int
    weight: float
    state: BucketState | None
    measured: bool = True

    def residual(self, name: str, part: Piece) -> int:
        """The address of what quantising left out of a part; 0 where nothing is kept."""
        if self.wire != codec.INT8 or self.state is None:
            return 0
        if (kept := self.state.kept.get(name)) is None:
            kept = self.state.kept[name] = np.zeros(self.length, np.float32)
        return kept.ctypes.data + 4 * part.position

    def squares_at(self, part: Piece, *, own: bool) -> tuple[int, int, int, int]:
        """Where squares go by parameter, as the kernels of `message` take it."""
        if not self.measured:
            return message.NO_SQUARES
        if self.state is None:
            return 0, message.WHOLE_ONLY, part.position, 0
        sums = self.state.own_squared_norms if own else self.state.mean_squared_norms
        assert isinstance(sums, np.ndarray)
        return self.state.ends.ctypes.data, len(self.state.ends), part.position, sums.ctypes.data


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a bucket: `length` numbers at `address`, the first of which is number `position` of the bucket."""

    address: int
    length: int
    position: int

    def share(self, index: int, count: int, element_bytes: int) -> Piece:
        """What member `index` of `count` owns of it."""
        size = -(-self.length // count)
        start, stop = min(self.length, index * size), min(self.length, (index + 1) * size)
        return Piece(self.address + element_bytes * start, stop - start, self.position + start)


NOTHING = Piece(0, 0, 0)


def begin_squares(state: BucketState | None, length: int) -> None:
    """Zero the sums of a bucket's parameters, which its pieces are added to."""
    if state is None:
        return
    if state.ends[-1] != length:
        raise ValueError(f"the state is of a bucket of {state.ends[-1]} elements, not {length}")
    for squares in (state.own_squared_norms, state.mean_squared_norms):
        squares[:] = 0


def pieces_of(address: int, length: int, element_bytes: int, piece_bytes: int) -> tuple[int, Callable[[int], Piece]]:
    """How many pieces a bucket has (one where it is empty), and what makes each of them."""
    size = piece_bytes // element_bytes

    def piece(index: int) -> Piece:
        start = index * size
        return Piece(address + element_bytes * start, min(size, length - start), start)

    return max(1, -(-length // size)), piece
