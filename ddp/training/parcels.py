"""A batch on its way from one process to another: all of it in one nameless file in memory.

The worker writes tensors and arrays as they lie, and a small pickle that says where each of them is; the rank maps the
file and has tensors in it without another copy. Nothing of it is in /dev/shm, so a container's small one does not
matter, nothing is left behind whoever is killed, and what cannot be sent is known to the worker before anything is.

The pickle never leaves the processes that one rank forked: it is in a file without a name, whose descriptor came
through a socket pair without one.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64  # what torch's own allocator gives
MOST_PARTS = 10_000  # their sizes travel in one message


def pack(value: Any) -> tuple[int, list[int]]:
    """`value` in a file: its descriptor, which the caller closes, and the bytes of each part, the pickle's first."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    if len(parts) > MOST_PARTS:
        raise ValueError(f"a batch of {len(buffers)} tensors and arrays: let the data set's collate stack them")
    sizes = [part.nbytes for part in parts]
    file = os.memfd_create("ddp batch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, _total(sizes))
        for part, start in zip(parts, _starts(sizes), strict=True):
            _write(file, part, start)
    except BaseException:
        os.close(file)
        raise
    return file, sizes


def unpack(file: int, sizes: Sequence[int]) -> Any:
    """The value that `pack` put into `file`; its tensors lie in there. The descriptor may be closed afterwards."""
    view = memoryview(mmap.mmap(file, _total(sizes), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    first, *rest = [view[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)]
    return pickle.loads(first, buffers=rest)  # noqa: S301  written by a process that this one forked


class _Pickler(pickle.Pickler):
    """Leaves the contents of plain tensors out of the pickle, as protocol 5 does with numpy's arrays."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
            return NotImplemented
        if value.requires_grad or value.is_quantized:
            return NotImplemented
        plain = value.resolve_conj().resolve_neg().contiguous()
        flat = plain.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat.data), plain.dtype, tuple(plain.shape))


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not memoryview(buffer).nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _write(file: int, part: memoryview, start: int) -> None:
    written = 0
    while written < part.nbytes:  # the kernel takes at most 2 GiB at once
        written += os.pwrite(file, part[written:], start + written)


def _starts(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(map(_aligned, sizes[:-1]), initial=0))


def _total(sizes: Sequence[int]) -> int:
    return sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
