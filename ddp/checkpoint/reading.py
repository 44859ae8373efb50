"""Reading checkpoints back: which one to take, whether it is whole, and what it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp.checkpoint.manifest import LARGEST_MANIFEST_BYTES, Manifest, OtherVersionError, parse_manifest
from ddp.checkpoint.names import MANIFEST, SHARED, candidates, rank_file
from ddp.checkpoint.ownership import check_own_directory, open_own
from ddp.checkpoint.part_file import Maker, check_content, read_part
from ddp.errors import CheckpointError

logger = logging.getLogger(__name__)


def newest(
    directory: Path, log: Callable[[str], object] = logger.warning, *, at_most: int | None = None
) -> Path | None:
    """The checkpoint with the highest step (up to `at_most`) that verifies; `log` is told which were passed over, and why."""
    for candidate in candidates(directory):
        if at_most is not None and candidate.step > at_most:
            continue
        try:
            verify(candidate.path)
        except CheckpointError as fault:
            log(f"passing over a checkpoint: {fault}")
        else:
            return candidate.path
    return None


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, whole and ours; else a CheckpointError."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        with open_own(path / name) as file:
            _check(path / name, check_content, file, entry)
    return manifest


def load(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was saved as `shared` and as this rank's `own`, tensors on the CPU.

    With more ranks than wrote it, some get a copy of another's own: rank r that of rank r modulo their number.

    Raises:
        CheckpointError: missing, truncated, altered, or not ours.
    """
    from ddp.checkpoint.tensors import make

    manifest = read_manifest(path)
    own = rank_file(rank % manifest.world_size)
    return load_part(path, SHARED, manifest, make), load_part(path, own, manifest, make)


def load_shared(path: Path) -> dict[str, Any]:
    """What was saved as `shared` alone, tensors on the CPU."""
    from ddp.checkpoint.tensors import make

    return load_part(path, SHARED, read_manifest(path), make)


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, without a look at the files it names."""
    check_own_directory(path)
    with open_own(path / MANIFEST) as file:
        text = file.read(LARGEST_MANIFEST_BYTES + 1)
    if len(text) > LARGEST_MANIFEST_BYTES:
        raise CheckpointError(f"{path / MANIFEST}: not a checkpoint's manifest: over {LARGEST_MANIFEST_BYTES} bytes")
    try:
        return parse_manifest(text)
    except OtherVersionError as fault:
        raise CheckpointError(f"{path}: {fault}") from None
    except ValueError as fault:
        raise CheckpointError(f"{path / MANIFEST}: not a checkpoint's manifest: {fault}") from None


def load_part(path: Path, name: str, manifest: Manifest, make: Maker | None) -> dict[str, Any]:
    """One file, once its content is what was written; see `part_file.read_part`."""
    with open_own(path / name) as file:
        _check(path / name, check_content, file, manifest.files[name])
        value = read_part(path / name, file, make)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name}: holds no table")
    return value


def _check(path: Path, check: Callable[..., None], *arguments: Any) -> None:
    """A disk's fault in the middle of a file is one of the checkpoint."""
    try:
        check(path, *arguments)
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault}") from None
