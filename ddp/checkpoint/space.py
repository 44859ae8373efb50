"""Whether a file system has room for what is to be written to it, told before anything is."""

from __future__ import annotations

import os
from pathlib import Path

from ddp.errors import CheckpointError, UsageError

_CHECKPOINTS = 2  # the newest stays until the next one is complete


def check_space(directory: Path, size_bytes: int) -> None:
    """Before a run: is there room for two checkpoints of this size, of all ranks together, where they will go?

    Raises:
        UsageError: there is not.
    """
    place, free_bytes = _free(directory)
    if free_bytes < _CHECKPOINTS * size_bytes:
        raise UsageError(
            f"{directory}: {_CHECKPOINTS} checkpoints need {in_words(_CHECKPOINTS * size_bytes)}, {in_words(free_bytes)} "
            f"free on {place}; make room, or choose another run.directory"
        )


def require(directory: Path, size_bytes: int, what: str) -> None:
    """Before a file is written.

    Raises:
        CheckpointError: there is no room for it.
    """
    _, free_bytes = _free(directory)
    if free_bytes < size_bytes:
        raise CheckpointError(
            f"{what} needs {in_words(size_bytes)}, {in_words(free_bytes)} free on {directory}; make room, or lower "
            "checkpoint.keep"
        )


def in_words(size_bytes: int) -> str:
    for unit, width in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= width:
            return f"{size_bytes / width:.3g} {unit}" if size_bytes < 1000 * width else f"{size_bytes // width} {unit}"
    return f"{size_bytes} bytes"


def _free(directory: Path) -> tuple[Path, int]:
    """The directory, or the first above it that exists, and what this user may still write there."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    status = os.statvfs(place)
    return place, status.f_bavail * status.f_frsize
