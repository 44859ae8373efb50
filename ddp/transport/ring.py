"""The memory that ranks of a node share: how large its rings are, and where a kernel finds them."""

from __future__ import annotations

import os

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from ddp.errors import TransportError
from ddp.transport import protocol
from ddp.transport.blocks import BLOCK
from ddp.transport.jit import SUPPORTED
from ddp.transport.segment import HEADER_BYTES, Segment, share

CHUNK_BYTES = 128 * 1024
STREAM_BYTES = 64 * 1024
SMALL_BUCKET_BYTES = 2 * 1024 * 1024
DEPTH = 8
SLICE_RANKS = 4  # from so many ranks on, each reduces a slice of a chunk
SLICE_ELEMENTS = 4096  # of a bucket; below, whole chunks need fewer meetings
_PATIENCE_SECONDS = 0.25


def attach_segment(group: dist.ProcessGroup | None) -> Segment:
    """The segment of all ranks of `group`. Collective.

    Raises:
        TransportError: on all of them, where memory cannot be had or not be shared.
    """
    world_size = dist.get_world_size(group)
    if not SUPPORTED:
        raise TransportError("shared memory needs Linux on x86-64 or arm64")
    one_rank = protocol.CONTROL_BYTES + DEPTH * (CHUNK_BYTES + result_bytes(world_size))
    return share(HEADER_BYTES + world_size * one_rank, group)


def result_bytes(world_size: int) -> int:
    """The largest slice of a chunk, whose 16-bit elements are summed in twice as many bits."""
    return 2 * (-(-CHUNK_BYTES // world_size) + 32) // 64 * 64 + 64


def initial_state(segment: Segment | None, rank: int, world_size: int, scratch: NDArray[np.int64]) -> NDArray[np.int64]:
    """A kernel's private numbers before its first operation.

    Args:
        scratch: at least `scratch_length(world_size)` numbers that live as long as the state.
    """
    state = np.zeros(protocol.STATE_LENGTH, dtype=np.int64)
    if segment is not None:
        state[protocol.CONTROL] = segment.address + HEADER_BYTES
        state[protocol.RINGS] = state[protocol.CONTROL] + world_size * protocol.CONTROL_BYTES
        state[protocol.RESULTS] = state[protocol.RINGS] + world_size * DEPTH * CHUNK_BYTES
    else:
        state[protocol.CONTROL] = scratch[2:].ctypes.data  # a lone rank speaks to nobody
    state[protocol.SCRATCH] = scratch.ctypes.data
    state[protocol.TOTALS] = scratch[2:].ctypes.data
    state[protocol.WEIGHTS] = scratch[2 + BLOCK :].ctypes.data
    state[protocol.RESULT_BYTES] = result_bytes(world_size)
    state[protocol.RANK], state[protocol.WORLD_SIZE] = rank, world_size
    state[protocol.SLICES_FROM] = SLICE_ELEMENTS if world_size >= SLICE_RANKS else 1 << 62
    state[protocol.CHUNK_BYTES], state[protocol.DEPTH] = CHUNK_BYTES, DEPTH
    state[protocol.STREAM_BYTES], state[protocol.SMALL_BUCKET_BYTES] = STREAM_BYTES, SMALL_BUCKET_BYTES
    # Spinning while the rank waited for has no core is the main hazard: then yield soon.
    cores = {core for pid in (segment.pids if segment else ()) for core in os.sched_getaffinity(pid)}
    enough_cores = len(cores) >= world_size
    state[protocol.PAUSES], state[protocol.YIELDS] = (200 if enough_cores else 20), 20
    state[protocol.AHEAD] = 2 if enough_cores else DEPTH - 1
    state[protocol.PATIENCE] = int(_PATIENCE_SECONDS * 1e9)
    return state


def scratch_length(world_size: int) -> int:
    """Room for two numbers of system calls, a block of sums, and a weight a rank."""
    return 2 + BLOCK + world_size
