"""Writing a checkpoint so that a kill at any moment costs at most that one.

Every rank writes its part and a note of its size and hash into a directory with a name that no reader looks at. When
all have, rank 0 adds the manifest, flushes, and renames the directory; only then do older ones go.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp.checkpoint import space
from ddp.checkpoint.manifest import (
    LARGEST_MANIFEST_BYTES,
    VERSION,
    FileEntry,
    Manifest,
    entry_to_json,
    parse_entry,
    to_json,
)
from ddp.checkpoint.names import (
    MANIFEST,
    NOTE_SUFFIX,
    REPLACED,
    Candidate,
    Metric,
    candidates,
    part_names,
)
from ddp.checkpoint.ownership import check_folder, open_own, reason
from ddp.checkpoint.part_file import write_file
from ddp.checkpoint.reading import read_manifest
from ddp.checkpoint.staging import Part
from ddp.errors import CheckpointError

ABANDONED = ".abandoned-"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, and of all the `keep_best` with the best metric by `goal`."""

    keep: int
    keep_best: int = 0
    goal: str = "max"


def write_parts(partial: Path, parts: Sequence[Part], go_on: Callable[[], None] = lambda: None) -> None:
    """This rank's files, on the disk when it returns. `go_on` may raise between pieces.

    Raises:
        CheckpointError, OSError: they could not be written.
    """
    if not partial.parent.is_dir():
        partial.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _flush_directory(partial.parent.parent)
    check_folder(partial.parent, partial.parent.stat())
    headers = {part.name: part.header() for part in parts}
    need_bytes = sum(len(headers[part.name]) + len(part.data) for part in parts)
    space.require(partial.parent, need_bytes, " and ".join(headers))
    partial.mkdir(mode=0o700, exist_ok=True)
    for part in parts:
        entry = write_file(partial / part.name, headers[part.name], part.data, go_on=go_on)
        write_file(partial / f"{part.name}{NOTE_SUFFIX}", entry_to_json(entry).encode())


def publish(partial: Path, final: Path, step: int, world_size: int, metric: Metric | None) -> None:
    """Give the complete directory its name. Until the rename it does not exist, after it it is whole.

    Raises:
        CheckpointError, OSError: it could not be done; what was there before still is.
    """
    files = {name: _take_note(partial, name) for name in part_names(world_size)}
    write_file(partial / MANIFEST, to_json(Manifest(VERSION, step, world_size, files, metric)).encode())
    _flush_directory(partial)
    for earlier in _of_step(final.parent, step):
        if not earlier.is_replaced:
            replaced = earlier.path.with_name(f"{earlier.path.name}{REPLACED}")
            shutil.rmtree(replaced, ignore_errors=True)
            earlier.path.rename(replaced)
    partial.rename(final)
    _flush_directory(final.parent)
    for earlier in _of_step(final.parent, step):
        if earlier.is_replaced:
            _remove(earlier.path)


def remove_others(directory: Path, step: int, retention: Retention) -> None:
    """Leave what `retention` says up to `step`, and none after it: the run went back and left those behind."""
    found = candidates(directory)
    present = [each for each in found if each.step <= step]
    staying = {each.path for each in present[: retention.keep]} | set(_best(present, retention))
    for each in found:
        if each.path not in staying:
            _remove(each.path)
    for abandoned in directory.glob(f"{ABANDONED}*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def set_aside(directory: Path, step: int) -> None:
    """What lies after `step` is not to be taken any more: the run goes on from there. It goes with the next save."""
    for each in candidates(directory):
        if each.step > step:
            aside = directory / f"{ABANDONED}{each.path.name}"
            try:
                shutil.rmtree(aside, ignore_errors=True)
                each.path.rename(aside)
            except OSError as fault:
                logger.warning("%s: cannot set this abandoned checkpoint aside: %s", each.path, reason(fault))


def clear_left_overs(directory: Path) -> None:
    """Remove what a kill left of saves and removals; rank 0 does so once, before the first save of a run."""
    for left_over in directory.glob(".step-*"):
        try:
            shutil.rmtree(left_over)
        except OSError as fault:
            logger.warning("%s: cannot remove what an ended run left here: %s", left_over, reason(fault))


def _take_note(partial: Path, name: str) -> FileEntry:
    path = partial / f"{name}{NOTE_SUFFIX}"
    if not path.exists():
        raise CheckpointError(f"{name} is not in {partial}: do all nodes share this directory?")
    with open_own(path) as file:
        text = file.read(LARGEST_MANIFEST_BYTES)
    try:
        entry = parse_entry(text)
    except ValueError as fault:
        raise CheckpointError(f"{path}: {fault}") from None
    path.unlink()
    return entry


def _best(present: Sequence[Candidate], retention: Retention) -> list[Path]:
    """By the exact values in the manifests, of the metric that the newest one with any has; NaN is never best."""
    found: list[tuple[float, int, Path]] = []
    name: str | None = None
    for each in present if retention.keep_best else ():
        try:
            metric = read_manifest(each.path).metric
        except CheckpointError:
            continue
        if metric is None or math.isnan(metric.value):
            continue
        name = metric.name if name is None else name
        if metric.name == name:
            found.append((-metric.value if retention.goal == "min" else metric.value, each.step, each.path))
    return [path for _, _, path in sorted(found, reverse=True)[: retention.keep_best]]


def _remove(path: Path) -> None:
    """A half-removed one must not look like a checkpoint. One that cannot be removed is no reason to fail."""
    doomed = path.with_name(f".{path.name}.removed")
    try:
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as fault:
        logger.warning("%s: cannot remove this old checkpoint: %s", path, reason(fault))


def _of_step(directory: Path, step: int) -> list[Candidate]:
    return [each for each in candidates(directory) if each.step == step]


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
