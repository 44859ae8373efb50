"""All-reduce of one node's ranks through shared memory; the loops are in `kernels`.

Inline: the hook's thread does the work, without the GIL. A rank that dies is noticed within a fraction of a
second through its pidfd, one that stays away when the deadline passes; either is named.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ddp.errors import PeerLostError, TransportError
from ddp.transport import kernels
from ddp.transport.base import ROW_LENGTH, BucketState, Reduction, Transport
from ddp.transport.jit import SUPPORTED
from ddp.transport.segment import HEADER_BYTES, Segment, share

CHUNK_BYTES = 128 * 1024
DEPTH = 4
_PATIENCE_SECONDS = 0.25
_KERNELS = {torch.float32: kernels.all_reduce_float32, torch.float64: kernels.all_reduce_float64}


class SharedMemoryTransport(Transport):
    """Ranks that share one node's memory; float32 and float64.

    Args:
        segment: from `attach_segment`; None for a single rank.
        rank, world_size: of the group that made the segment.
        timeout_seconds: how long a rank may stay away before the others give it up.
    """

    name = "shared_memory"
    dtypes = frozenset(_KERNELS)

    def __init__(self, segment: Segment | None, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._timeout_seconds = timeout_seconds
        self._segment = segment
        self._pids = segment.pids if segment else ()
        self._pidfds = _open_pidfds(self._pids, rank)
        self._rows = np.zeros((world_size, ROW_LENGTH))
        self._state = _initial_state(segment, rank, world_size)
        self._sums = self._state.view(np.float64)
        self._scratch = np.zeros(2, dtype=np.int64)
        self._state[kernels.SCRATCH] = self._scratch.ctypes.data
        self._state_address = self._state.ctypes.data
        self._rows_address = self._rows.ctypes.data
        self._closed = False
        self._pid = os.getpid()

    @property
    def wait_seconds(self) -> float:
        return float(self._state[kernels.WAITED]) * 1e-9

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        kernel = _KERNELS[bucket.dtype]
        address, length = bucket.data_ptr(), bucket.numel()
        if kernel(self._state_address, address, length, weight) != kernels.DONE:
            self._persist(lambda: kernel(self._state_address, address, length, weight), f"{length} elements")
        return Reduction(bucket, float(self._sums[kernels.OWN_SUM]), float(self._sums[kernels.MEAN_SUM]))

    def exchange_row(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        row = np.ascontiguousarray(row, dtype=np.float64)
        if row.shape != (ROW_LENGTH,):
            raise ValueError(f"a row holds {ROW_LENGTH} numbers, not {row.shape}")
        address = row.ctypes.data
        if self._segment is None:
            return row[None].copy()
        if kernels.exchange_rows(self._state_address, address, self._rows_address) != kernels.DONE:
            self._persist(
                lambda: kernels.exchange_rows(self._state_address, address, self._rows_address), "the step's row"
            )
        return self._rows.copy()

    def close(self, *, failed: bool = False) -> None:
        if self._closed or os.getpid() != self._pid:  # a forked child leaves with the rank still at work
            return
        self._closed = True
        if self._segment is not None:
            line = int(self._state[kernels.CONTROL]) + kernels.CONTROL_BYTES * self.rank + kernels.DEPARTED
            kernels.store(line, kernels.FAILED if failed else kernels.LEFT)
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds = {}

    def _persist(self, attempt: Callable[[], int], what: str) -> None:
        """Go on waiting in slices, so that signals, deadlines and dead peers are seen in between."""
        began = time.monotonic()
        progress, gone = None, ""
        while (status := attempt()) != kernels.DONE:
            late = int(self._state[kernels.WAITING_FOR])
            if self._closed:  # by another thread than this one
                raise TransportError(f"rank {self.rank} closed the gradient exchange while it waited with {what}")
            if status == kernels.MISMATCH:
                raise TransportError(
                    f"rank {self.rank} brought {what} to the all-reduce, rank {late} another number: "
                    "the ranks do not run the same model or not in the same order"
                )
            now = (late, int(self._state[kernels.COPIED]), int(self._state[kernels.REDUCED]))
            if now != progress:
                progress, began, gone = now, time.monotonic(), ""
            where = f"rank {late} (pid {self._pids[late]}, host {socket.gethostname()})"
            if gone:
                raise PeerLostError(f"{where} {gone} while rank {self.rank} waited for it with {what}")
            gone = self._how_gone(late)  # and once more: what it published before it went still counts
            if time.monotonic() - began > self._timeout_seconds:
                raise PeerLostError(
                    f"{where} did not bring {what} within {self._timeout_seconds:g} s (transport.timeout_seconds) "
                    f"to rank {self.rank}: it hangs, is stopped, or took another path through the program"
                )

    def _how_gone(self, rank: int) -> str:
        """Empty while `rank` is there."""
        departed = kernels.load(int(self._state[kernels.CONTROL]) + kernels.CONTROL_BYTES * rank + kernels.DEPARTED)
        if departed:
            return "failed" if departed == kernels.FAILED else "left"
        return "died" if rank in self._pidfds and _has_exited(self._pidfds[rank]) else ""


def attach_segment(group: dist.ProcessGroup | None) -> Segment:
    """The segment of all ranks of `group`. Collective.

    Raises:
        TransportError: on all of them, where memory cannot be had or not be shared.
    """
    world_size = dist.get_world_size(group)
    if not SUPPORTED:
        raise TransportError("shared memory needs Linux on x86-64 or arm64")
    return share(HEADER_BYTES + world_size * (kernels.CONTROL_BYTES + DEPTH * CHUNK_BYTES), group)


def _initial_state(segment: Segment | None, rank: int, world_size: int) -> NDArray[np.int64]:
    state = np.zeros(kernels.STATE_LENGTH, dtype=np.int64)
    if segment is not None:
        state[kernels.CONTROL] = segment.address + HEADER_BYTES
        state[kernels.RINGS] = segment.address + HEADER_BYTES + world_size * kernels.CONTROL_BYTES
    state[kernels.RANK], state[kernels.WORLD_SIZE] = rank, world_size
    state[kernels.CHUNK_BYTES], state[kernels.DEPTH] = CHUNK_BYTES, DEPTH
    # Spinning while the rank waited for has no core is the main hazard: then yield soon.
    cores = {core for pid in (segment.pids if segment else ()) for core in os.sched_getaffinity(pid)}
    enough_cores = len(cores) >= world_size
    state[kernels.PAUSES], state[kernels.YIELDS] = (200 if enough_cores else 20), 20
    state[kernels.PATIENCE] = int(_PATIENCE_SECONDS * 1e9)
    return state


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
