"""All-reduce of one node's ranks through shared memory; the loops are in `kernels`.

Inline: the hook's thread does the work, without the GIL. A rank that dies is noticed within a fraction of a
second through its pidfd, one that stays away when the deadline passes; either is named.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp.errors import PeerLostError, TransportError
from ddp.transport import codec, kernels, protocol
from ddp.transport.base import ROW_LENGTH, BucketState, Reduction, Transport
from ddp.transport.ring import CHUNK_BYTES, initial_state, scratch_length
from ddp.transport.segment import Segment


@dataclass(frozen=True, slots=True)
class _Kernels:
    """What serves one dtype."""

    all_reduce: Any
    reduce_scatter: Any
    all_gather: Any
    sums: torch.dtype  # that sums are made in


_KERNELS = {
    torch.float32: _Kernels(
        kernels.all_reduce_float32, kernels.reduce_scatter_float32, kernels.all_gather_float32, torch.float32
    ),
    torch.float64: _Kernels(
        kernels.all_reduce_float64, kernels.reduce_scatter_float64, kernels.all_gather_float64, torch.float64
    ),
    torch.bfloat16: _Kernels(
        kernels.all_reduce_bfloat16, kernels.reduce_scatter_bfloat16, kernels.all_gather_bfloat16, torch.float32
    ),
    torch.float16: _Kernels(
        kernels.all_reduce_float16, kernels.reduce_scatter_float16, kernels.all_gather_float16, torch.float32
    ),
}


class SharedMemoryTransport(Transport):
    """Ranks that share one node's memory; float32, float64, bfloat16 and float16, the last two summed in float32.

    Args:
        segment: from `attach_segment`; None for a single rank.
        rank, world_size: of the group that made the segment.
        timeout_seconds: how long a rank may stay away before the others give it up.
        wire: what float32 gradients travel as between the ranks, see `codec`; others travel as they are.
        names: what the ranks are called in errors, where they are some of more ranks.
    """

    name = "shared_memory"
    dtypes = frozenset(_KERNELS)

    def __init__(
        self,
        segment: Segment | None,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        wire: str = "gradient",
        names: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._timeout_seconds = timeout_seconds
        self._names = names or range(world_size)
        self._segment = segment
        self._pids = segment.pids if segment else ()
        self._pidfds = _open_pidfds(self._pids, rank)
        self._rows = np.zeros((world_size, ROW_LENGTH))
        self._scratch = np.zeros(scratch_length(world_size), dtype=np.int64)
        self._wire = codec.wire_kind(wire, codec.FLOAT32)
        self._state = initial_state(segment, rank, world_size, self._scratch)
        self._state[protocol.WIRE] = self._wire
        self._sums = memoryview(self._state.view(np.float64).data)  # half the time of an array's elements
        self._state_address = self._state.ctypes.data
        self._rows_address = self._rows.ctypes.data
        self._whole = BucketState.of([1 << 62])
        self._whole_address = self._description(self._whole, 0)[1]
        self._ready: dict[torch.dtype, Any] = {}  # kernels that are compiled
        self._ready_halves: set[torch.dtype] = set()
        self._closed = False
        self._pid = os.getpid()

    @property
    def wait_seconds(self) -> float:
        return float(self._state[protocol.WAITED]) * 1e-9

    @property
    def _encodes(self) -> bool:
        return self._wire != codec.FLOAT32 and self.world_size > 1

    def prepare(self, dtypes: Iterable[torch.dtype]) -> None:
        for dtype in dtypes:
            encoded = self._encodes and dtype == torch.float32
            kernel = kernels.all_reduce_encoded_float32 if encoded else _KERNELS[dtype].all_reduce
            kernel.prepare()
            self._ready[dtype] = kernel

    def prepare_halves(self, dtypes: Iterable[torch.dtype]) -> None:
        """As `prepare`, for `reduce_scatter` and `all_gather`."""
        for dtype in dtypes:
            _KERNELS[dtype].reduce_scatter.prepare()
            _KERNELS[dtype].all_gather.prepare()
            self._ready_halves.add(dtype)

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        kernel, length = self._ready.get(bucket.dtype), bucket.numel()
        if kernel is None:
            self.prepare((bucket.dtype,))
            kernel = self._ready[bucket.dtype]
        description = self._whole_address if state is None else self._description(state, length)[1]
        arguments = (self._state_address, bucket.data_ptr(), length, weight, description)
        if kernel(*arguments) != protocol.DONE:
            self._persist(lambda: kernel(*arguments), f"{length} elements")
        return Reduction(bucket, self._sums[protocol.OWN_SUM], self._sums[protocol.MEAN_SUM])

    def slices_length(self, length: int, dtype: torch.dtype) -> int:
        """Elements of this rank's slices of a bucket of `length` elements."""
        return kernels.slices_length(length, CHUNK_BYTES // dtype.itemsize, self.rank, self.world_size)

    def largest_slices_length(self, length: int, dtype: torch.dtype) -> int:
        """The most that `slices_length` gives any rank for `length` elements or fewer."""
        elements = CHUNK_BYTES // dtype.itemsize
        return -(-length // elements) * kernels.slices_length(elements, elements, 0, self.world_size)

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What sums of gradients of `dtype` are made in."""
        return _KERNELS[dtype].sums

    def reduce_scatter(self, piece: Tensor, weight: float, out: Tensor, state: BucketState, offset: int) -> float:
        """The first half of an all-reduce: `out` = this rank's slices of the sum of weight_r * piece_r.

        Which elements these are depends on the piece's length and dtype and the number of ranks alone.

        Args:
            piece: 1-D contiguous part of a bucket, from its element `offset` on; it stays as it is.
            out: 1-D contiguous, of `slices_length(len(piece), piece.dtype)` elements of `sum_dtype(piece.dtype)`.
            state: the bucket's; what the piece adds to the parameters' own squared norms is added.

        Returns:
            The piece's own squared norm.

        Raises:
            PeerLostError, TransportError: as `all_reduce_mean_`.
        """
        if piece.dtype not in self._ready_halves:
            self.prepare_halves((piece.dtype,))
        self._half(_KERNELS[piece.dtype].reduce_scatter, piece, weight, out, state, offset)
        return self._sums[protocol.OWN_SUM]

    def all_gather(self, own: Tensor, piece: Tensor, state: BucketState, offset: int) -> float:
        """The second half: `piece` is written from all ranks' slices, of which `own` holds this rank's.

        Returns:
            The squared norm of what was written; what the parameters have of it is added to `state`.
        """
        self._half(_KERNELS[piece.dtype].all_gather, piece, 0.0, own, state, offset)
        return self._sums[protocol.MEAN_SUM]

    def _half(self, kernel: Any, piece: Tensor, weight: float, slices: Tensor, state: BucketState, offset: int) -> None:
        description, description_address = self._description(state, piece.numel())
        description[protocol.OFFSET] = offset
        arguments = (self._state_address, piece.data_ptr(), piece.numel(), weight, description_address)
        if kernel(*arguments, slices.data_ptr()) != protocol.DONE:
            self._persist(lambda: kernel(*arguments, slices.data_ptr()), f"{piece.numel()} elements")

    def _description(self, state: BucketState, length: int) -> tuple[NDArray[np.int64], int]:
        """What a kernel needs to know of a bucket, and its address; made once, as `state` keeps its arrays."""
        known = state.kept.get(self.name)
        if known is None:
            description = np.zeros(protocol.BUCKET_LENGTH, dtype=np.int64)
            description[protocol.ENDS] = state.ends.ctypes.data
            description[protocol.OWN_SUMS] = _address(state.own_squared_norms)
            description[protocol.MEAN_SUMS] = _address(state.mean_squared_norms)
            description[protocol.PARAMETERS] = len(state.ends)
            if self._encodes and self._wire == codec.INT8 and length:
                residual = state.kept.setdefault("residual", np.zeros(length, dtype=np.float32))
                description[protocol.RESIDUAL] = residual.ctypes.data
            known = state.kept[self.name] = (description, description.ctypes.data)
        return known

    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        row = np.ascontiguousarray(row, dtype=np.float64)
        if row.shape != (ROW_LENGTH,):
            raise ValueError(f"a row holds {ROW_LENGTH} numbers, not {row.shape}")
        address = row.ctypes.data
        if self._segment is None:
            return row[None].copy()
        if kernels.exchange_rows(self._state_address, address, self._rows_address) != protocol.DONE:
            self._persist(
                lambda: kernels.exchange_rows(self._state_address, address, self._rows_address), "the step's row"
            )
        return self._rows.copy()

    def close(self, *, failed: bool = False) -> None:
        if self._closed or os.getpid() != self._pid:  # a forked child leaves with the rank still at work
            return
        self._closed = True
        if self._segment is not None:
            kernels.store(self._line(self.rank) + protocol.DEPARTED, protocol.FAILED if failed else protocol.LEFT)
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds = {}

    def _persist(self, attempt: Callable[[], int], what: str) -> None:
        """Go on waiting in slices, so that signals, deadlines and dead peers are seen in between."""
        began = time.monotonic()
        progress, gone, here = None, "", self._names[self.rank]
        while (status := attempt()) != protocol.DONE:
            late = int(self._state[protocol.WAITING_FOR])
            if self._closed:  # by another thread than this one
                raise TransportError(f"rank {here} closed the gradient exchange while it waited with {what}")
            if status == protocol.MISMATCH:
                raise TransportError(
                    f"rank {here} brought {what} to the all-reduce, rank {self._names[late]} another number, or of another type: "
                    "the ranks do not run the same model or not in the same order"
                )
            now = (late, int(self._state[protocol.COPIED]), int(self._state[protocol.REDUCED]))
            if now != progress:
                progress, began, gone = now, time.monotonic(), ""
            where = f"rank {self._names[late]} (pid {self._pids[late]}, host {socket.gethostname()})"
            if gone:
                raise PeerLostError(
                    f"{where} {gone} while rank {here} waited for it with {what}", lost_rank=self._names[late]
                )
            gone = self._how_gone(late)  # and once more: what it published before it went still counts
            if time.monotonic() - began > self._timeout_seconds:
                if elsewhere := kernels.load(self._line(late) + protocol.WAITS_ELSEWHERE):
                    raise PeerLostError(
                        f"rank {elsewhere - 1} did not bring {what} within {self._timeout_seconds:g} s "
                        f"(transport.timeout_seconds) to {where}, for which rank {here} waits in turn",
                        lost_rank=elsewhere - 1,
                    )
                raise PeerLostError(
                    f"{where} did not bring {what} within {self._timeout_seconds:g} s (transport.timeout_seconds) "
                    f"to rank {here}: it hangs, is stopped, or took another path through the program",
                    lost_rank=self._names[late],
                )

    def waits_for(self, name: int | None) -> None:
        """Tell this node that this rank waits for the rank called `name` on another one; None: no more."""
        kernels.store(self._line(self.rank) + protocol.WAITS_ELSEWHERE, 0 if name is None else name + 1)

    def _line(self, rank: int) -> int:
        """The address of a rank's control block."""
        return int(self._state[protocol.CONTROL]) + protocol.CONTROL_BYTES * rank

    def _how_gone(self, rank: int) -> str:
        """Empty while `rank` is there."""
        departed = kernels.load(self._line(rank) + protocol.DEPARTED)
        if departed:
            return "failed" if departed == protocol.FAILED else "left"
        return "died" if rank in self._pidfds and _has_exited(self._pidfds[rank]) else ""


def _address(sums: NDArray[np.float64] | Tensor) -> int:
    assert isinstance(sums, np.ndarray)
    return sums.ctypes.data


def _open_pidfds(pids: tuple[int, ...], own_rank: int) -> dict[int, int]:
    """A descriptor a peer that becomes readable when the peer dies; the deadline serves where none is given."""
    descriptors: dict[int, int] = {}
    for rank, pid in enumerate(pids):
        if rank != own_rank:
            with suppress(OSError):
                descriptors[rank] = os.pidfd_open(pid)
    return descriptors


def _has_exited(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
