"""Weights from a safetensors file that anyone may have written, read with the distrust that checkpoints are read with."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ddp.checkpoint.layout import LENGTH_BYTES, Place, header_length, parse_any
from ddp.checkpoint.ownership import open_own
from ddp.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class WeightsFile:
    """An open file: its `texts`, `shapes` by name, and the tensors that are asked for. Use as a context manager.

    Raises:
        CheckpointError: it is a link, another user's, cannot be read, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link, which is not followed: name the file that it leads to")
        self._file = open_own(path)
        try:
            self._begin, self._places, self.texts = self._guarded(self._header)
        except CheckpointError:
            self._file.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """On the CPU, in the dtype of the file."""
        return self._guarded(lambda: self._tensor(self._places[name]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _header(self) -> tuple[int, dict[str, Place], dict[str, Any]]:
        file: BufferedReader = self._file
        file_bytes = os.fstat(file.fileno()).st_size
        length = header_length(file.read(LENGTH_BYTES), file_bytes)
        begin = LENGTH_BYTES + length
        texts, places = parse_any(file.read(length), file_bytes - begin)
        return begin, {place.name: place for place in places}, texts

    def _tensor(self, place: Place) -> Tensor:
        from ddp.checkpoint.tensors import make

        tensor, memory = make(place.dtype, place.shape)
        self._file.seek(self._begin + place.start)
        if self._file.readinto(memory) != place.size_bytes:
            raise ValueError(f"ends within tensor {place.name!r:.200}")
        return tensor

    def _guarded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ValueError as fault:
            raise CheckpointError(f"{self._path}: not a whole safetensors file: {fault}") from None
        except (OSError, MemoryError) as fault:
            raise CheckpointError(f"{self._path}: cannot be read: {fault or 'out of memory'}") from None
