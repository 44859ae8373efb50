"""Memory that a part of a checkpoint is copied to before the step goes on, laid out as its file will be.

Kept from save to save: the system zeroes a fresh page when it is first touched, which costs more than the copy.
Here are no tensors of torch's yet: `RawTensor` is one without it, and where torch is loaded `tensors` knows its own.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ddp.checkpoint.layout import Place, arrange, header
from ddp.checkpoint.plain_tree import flatten
from ddp.errors import CheckpointError

_PAGE_BYTES = 2 << 20  # a huge one, where the system gives those


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor without torch: its elements' bytes, row after row. `dtype` as safetensors calls it, F32 and so on."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """What one file is to hold: a tree of plain values, and its tensors' bytes in staging memory."""

    name: str
    tree: Any
    places: list[Place]
    data: memoryview

    def header(self) -> bytes:
        """Text in the file before the data. Takes a while: for the thread that writes."""
        try:
            return header(self.tree, self.places)
        except ValueError as fault:
            raise CheckpointError(f"{self.name}: {fault}") from None


class Staging:
    """Staging memory for one file, grown where a part needs more; what was staged before is overwritten."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def stage(self, name: str, value: Mapping[str, Any]) -> Part:
        """Copy `value` as it is now.

        Raises:
            CheckpointError: it holds something that is neither a plain value nor a tensor.
        """
        tree, described, copies = _look_at(name, value)
        places = arrange(described)
        memory = self._reserve(places[-1].stop if places else 0)
        for place in places:
            if place.size_bytes:
                copies[place.name](memory[place.start : place.stop])
        return Part(name, tree, places, memory)

    def _reserve(self, size_bytes: int) -> memoryview:
        if self._memory is None or len(self._memory) < size_bytes:
            self._memory = None  # before there are two
            self._memory = mmap.mmap(-1, max(1, -(-size_bytes // _PAGE_BYTES)) * _PAGE_BYTES)
            with suppress(OSError, AttributeError, ValueError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self._memory)[:size_bytes]


def check(name: str, value: Mapping[str, Any]) -> None:
    """Whether `value` could be staged; copies nothing.

    Raises:
        CheckpointError: as `Staging.stage`.
    """
    _look_at(name, value)


def _look_at(
    name: str, value: Mapping[str, Any]
) -> tuple[Any, dict[str, tuple[str, tuple[int, ...]]], dict[str, Callable[[memoryview], None]]]:
    """The tree without its tensors; of these dtypes and shapes, and what copies each."""
    torch_tensors = _torch_tensors()
    is_tensor = _is_raw if torch_tensors is None else lambda item: _is_raw(item) or torch_tensors.is_tensor(item)
    tree, tensors = flatten(value, name, is_tensor)
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    copies: dict[str, Callable[[memoryview], None]] = {}
    for key, tensor in tensors.items():
        module = sys.modules[__name__] if _is_raw(tensor) else torch_tensors
        assert module is not None
        described[key] = module.describe(tensor, f"{name}: {key}")
        copies[key] = _copier(module, tensor)
    return tree, described, copies


def describe(tensor: RawTensor, where: str) -> tuple[str, tuple[int, ...]]:
    """Its dtype and shape, once its bytes are that many."""
    place = Place(where, tensor.dtype, tensor.shape, 0)
    if len(memoryview(tensor.data).cast("B")) != place.size_bytes:
        raise CheckpointError(f"{where}: {tensor.dtype} {tensor.shape} does not fill its bytes")
    return tensor.dtype, tensor.shape


def copy_into(memory: memoryview, tensor: RawTensor) -> None:
    memory[:] = memoryview(tensor.data).cast("B")


def make(dtype: str, shape: tuple[int, ...]) -> tuple[RawTensor, memoryview]:
    """A tensor to read into, and its memory."""
    data = bytearray(Place("", dtype, shape, 0).size_bytes)
    return RawTensor(dtype, shape, data), memoryview(data)


def _copier(module: Any, tensor: Any) -> Callable[[memoryview], None]:
    return lambda memory: module.copy_into(memory, tensor)


def _is_raw(item: Any) -> bool:
    return isinstance(item, RawTensor)


def _torch_tensors() -> ModuleType | None:
    """The module for torch's tensors; where nobody has loaded torch there are none."""
    if "torch" not in sys.modules:
        return None
    from ddp.checkpoint import tensors

    return tensors
