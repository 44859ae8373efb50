"""One part of a checkpoint as a safetensors file: written by pieces without the interpreter's lock, read with distrust."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from ddp.checkpoint.layout import LENGTH_BYTES, Place, header_length, parse
from ddp.checkpoint.manifest import FileEntry
from ddp.checkpoint.plain_tree import unflatten
from ddp.errors import CheckpointError

PIECE_BYTES = 4 << 20  # hashing and writing one releases the interpreter's lock for some milliseconds
Maker = Callable[[str, tuple[int, ...]], tuple[Any, memoryview]]


def create(path: Path) -> int:
    """Open a new file that is ours alone; one that a kill left in a directory that is being written gives way."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def write_file(path: Path, *contents: bytes | memoryview, go_on: Callable[[], None] = lambda: None) -> FileEntry:
    """Write and flush to the disk; returns size and hash of what was written. `go_on` may raise between pieces."""
    digest, size_bytes = hashlib.sha256(), 0
    descriptor = create(path)
    try:
        for content in map(memoryview, contents):
            for start in range(0, len(content), PIECE_BYTES):
                go_on()
                piece = content[start : start + PIECE_BYTES]
                digest.update(piece)
                size_bytes += len(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size_bytes, digest.hexdigest())


def check_content(path: Path, file: BufferedReader, entry: FileEntry) -> None:
    """Compare with what was written; leaves the file at its beginning.

    Raises:
        CheckpointError: it is something else.
    """
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != entry.size_bytes:
        raise CheckpointError(f"{path}: {size_bytes} bytes where {entry.size_bytes} were written")
    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
        raise CheckpointError(f"{path}: its content has changed since it was written (SHA-256)")
    file.seek(0)


def read_part(path: Path, file: BufferedReader, make: Maker | None) -> Any:
    """The tree with its tensors, each made by `make` and read into place; without `make` None in each one's place.

    Raises:
        CheckpointError: not a part of a checkpoint, or it cannot be read.
    """
    try:
        file_bytes = os.fstat(file.fileno()).st_size
        length = header_length(file.read(LENGTH_BYTES), file_bytes)
        tree, places = parse(file.read(length), file_bytes - LENGTH_BYTES - length)
        tensors = {place.name: None if make is None else _read_tensor(file, place, make) for place in places}
        return unflatten(tree, tensors)
    except ValueError as fault:
        raise CheckpointError(
            f"{path}: holds something else than tensors and plain values as safetensors; not loaded: {fault}"
        ) from None
    except (OSError, MemoryError) as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault or 'out of memory'}") from None


def _read_tensor(file: BufferedReader, place: Place, make: Maker) -> Any:
    tensor, memory = make(place.dtype, place.shape)
    if file.readinto(memory) != place.size_bytes:
        raise ValueError(f"ends within tensor {place.name!r:.200}")
    return tensor
