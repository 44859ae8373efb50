"""Checkpoints: what a run needs to go on exactly where it was, safe against a kill at any moment.

    checkpoints/
      step-00000120/
        shared.pt         what all ranks hold alike: model parameters, optimizer, counters, history
        rank-00003.pt     what rank 3 alone holds: BatchNorm's running statistics, random generators
        manifest.json     version, step, world size, and size and SHA-256 of each file; written last
      .step-00000130.partial/   being written, or left by a kill: never read, removed by the next save

All ranks write into the partial directory; once every part is on the disk rank 0 adds the manifest and renames the
directory, and only then do older ones go. So the newest directory with a name is whole unless the disk
is at fault, which sizes and hashes tell. Files hold tensors and plain values and are read back with
`torch.load(weights_only=True)` alone: loading a checkpoint runs no code of its author's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ddp.errors import CheckpointError

VERSION = 2  # of the manifest and of what `state` keeps: 1 knew no course
SHARED = "shared.pt"
MANIFEST = "manifest.json"
# A directory that gave way to a new one of the same step keeps a readable name until the new one has its own.
STEP_DIRECTORY = re.compile(r"step-(\d{8,})(\.replaced)?")
PLAIN_TYPES = frozenset({type(None), bool, int, float, complex, str, bytes})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint, as it was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of; `files` by name."""

    version: int
    step: int
    world_size: int
    files: Mapping[str, FileEntry]


# --- writing ----------------------------------------------------------------------------------------------------


def save(
    directory: Path,
    step: int,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    barrier: Callable[[], object],
    keep: int,
) -> Path:
    """Write one checkpoint; all ranks call it together, and all return or all raise.

    Args:
        directory: the run's `checkpoints`, the same on all ranks; made where it is missing.
        step: optimizer steps taken so far.
        shared: what all ranks hold alike; only rank 0's is written, the others may pass `{}`.
        own: what this rank alone holds.
        barrier: returns once every rank has called it; called three times, also after a failure.
        keep: how many checkpoints stay, counted back from this one. Newer ones go: the run went back to an
            older checkpoint and left them behind.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: a rank could not write its part. Nothing of this checkpoint stays; older ones do.
    """
    partial, final = directory / f".{_name(step)}.partial", directory / _name(step)
    parts = {_rank_file(rank): own} | ({SHARED: shared} if rank == 0 else {})
    fault = _attempt(_prepare, directory, partial) if rank == 0 else None
    barrier()
    fault = fault or _attempt(_write_parts, partial, parts)
    written = _identity(partial)
    barrier()
    if rank == 0:
        fault = fault or _attempt(_publish, partial, final, step, world_size)
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    if fault:
        failed = CheckpointError(f"{final}: rank {rank} could not save step {step}: {_reason(fault)}")
        no_directory = rank != 0 and isinstance(fault, FileNotFoundError)  # rank 0 could not make it
        failed.consequence = no_directory or getattr(fault, "consequence", False)
        raise failed from fault
    if _identity(final) != written:
        raise _followed(f"{final}: step {step} is not saved, because another rank could not; see its message")
    if rank == 0:
        _remove_others(directory, step, keep)
    return final


def _attempt(action: Callable[..., None], *args: Any) -> Exception | None:
    """The fault of `action`, kept until all ranks have met: who leaves early lets the others wait."""
    try:
        action(*args)
    except (OSError, RuntimeError, CheckpointError) as fault:  # torch wraps a failed write in a RuntimeError
        return fault
    return None


def _followed(message: str) -> CheckpointError:
    """The error of a rank that could have saved, had another rank not failed."""
    error = CheckpointError(message)
    error.consequence = True
    return error


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left_over in directory.glob(".step-*"):
        shutil.rmtree(left_over)
    partial.mkdir(mode=0o700)


def _write_parts(partial: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """This rank's files, each with a note of its size and hash for rank 0's manifest."""
    for name, value in parts.items():
        _check_plain(value, name)
        with _create(partial / name) as file:
            torch.save(value, file)
            _flush(file)
        with (partial / name).open("rb") as file:
            entry = FileEntry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
        (partial / f"{name}.note").write_text(json.dumps(asdict(entry)), encoding="ascii")


def _read_note(partial: Path, name: str) -> FileEntry:
    return FileEntry(**json.loads((partial / f"{name}.note").read_text(encoding="ascii")))


def _publish(partial: Path, final: Path, step: int, world_size: int) -> None:
    """Give the complete directory its name. Until the rename it does not exist, after it it is whole."""
    files: dict[str, FileEntry] = {}
    for name in (SHARED, *map(_rank_file, range(world_size))):
        try:
            files[name] = _read_note(partial, name)
        except FileNotFoundError:
            raise _followed(f"{name} was not written; see that rank's message") from None
        (partial / f"{name}.note").unlink()
    with _create(partial / MANIFEST) as file:
        file.write(json.dumps(asdict(Manifest(VERSION, step, world_size, files)), indent=1).encode())
        _flush(file)
    _flush_directory(partial)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _flush_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """What a directory keeps when it is renamed: it tells this save's from an earlier one of the same step."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_others(directory: Path, step: int, keep: int) -> None:
    """Leave `keep` checkpoints up to `step` and none after it. One that cannot be removed is no reason to fail."""
    candidates = _candidates(directory)
    abandoned = [path for found, _, path in candidates if found > step]
    for path in abandoned + [path for found, _, path in candidates if found <= step][keep:]:
        doomed = directory / f".{path.name}.removed"  # a half-removed one must not look like a checkpoint
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as fault:
            logger.warning("%s: cannot remove this old checkpoint: %s", path, _reason(fault))


def _check_plain(value: Any, where: str) -> None:
    """Refuse now what `torch.load(weights_only=True)` would refuse when the run has to go on."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{where}: a key")
            _check_plain(item, f"{where}: {key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in PLAIN_TYPES:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(f"{where}: a checkpoint holds tensors and plain values, not a {kind}")


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------------


def newest(directory: Path) -> Path | None:
    """The checkpoint with the highest step that verifies; a bad one is passed over with a warning."""
    for _, _, path in _candidates(directory):
        try:
            verify(path)
        except CheckpointError as fault:
            logger.warning("passing over a checkpoint: %s", fault)
        else:
            return path
    return None


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, whole and ours; else a CheckpointError."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        with _open_own(path / name) as file:
            _check_content(path / name, file, entry)
    return manifest


def load(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was saved as `shared` and as this rank's `own`, tensors on the CPU.

    With more ranks than wrote it, some get a copy of another's own: rank r that of rank r modulo their number.

    Raises:
        CheckpointError: missing, truncated, altered, or not ours.
    """
    manifest = read_manifest(path)
    return _load_file(path, SHARED, manifest), _load_file(path, _rank_file(rank % manifest.world_size), manifest)


def load_shared(path: Path) -> dict[str, Any]:
    """What was saved as `shared` alone, tensors on the CPU."""
    return _load_file(path, SHARED, read_manifest(path))


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, without a look at the files it names."""
    _check_own(path, _stat(path), stat.S_ISDIR)
    with _open_own(path / MANIFEST) as file:
        text = file.read()
    try:
        table = json.loads(text)
        files = {name: FileEntry(**entry) for name, entry in table.pop("files").items()}
        manifest = Manifest(files=files, **table)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST}: not a checkpoint's manifest") from None
    if manifest.version != VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.version}, this program reads version {VERSION}; start a new run, or go "
            "on with the ddp that wrote it"
        )
    if unsafe := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{path / MANIFEST}: names a file outside the checkpoint: {unsafe[0]}")
    return manifest


def _load_file(path: Path, name: str, manifest: Manifest) -> dict[str, Any]:
    if name not in manifest.files:
        raise CheckpointError(f"{path / MANIFEST}: does not name {name}")
    with _open_own(path / name) as file:
        _check_content(path / name, file, manifest.files[name])
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(f"{path / name}: holds more than tensors and plain values; not loaded") from None
        except (RuntimeError, EOFError, OSError, ValueError) as fault:
            raise CheckpointError(f"{path / name}: cannot be read: {fault}") from None


def _check_content(path: Path, file: BufferedReader, entry: FileEntry) -> None:
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != entry.size_bytes:
        raise CheckpointError(f"{path}: {size_bytes} bytes where {entry.size_bytes} were written")
    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
        raise CheckpointError(f"{path}: its content has changed since it was written (SHA-256)")
    file.seek(0)


def _open_own(path: Path) -> BufferedReader:
    """Open a file for reading if it is a plain one of this user's; a link is not followed."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(fault)}") from None
    try:
        _check_own(path, os.fstat(file.fileno()), stat.S_ISREG)
    except CheckpointError:
        file.close()
        raise
    return file


def _stat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as fault:
        raise CheckpointError(f"{path}: no such checkpoint: {_reason(fault)}") from None


def _check_own(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(status.st_mode):
        raise CheckpointError(f"{path}: not a plain file or directory of a checkpoint")
    if status.st_uid != os.geteuid():
        raise CheckpointError(f"{path}: belongs to user {status.st_uid}, not to you (user {os.geteuid()}); not loaded")
    if status.st_mode & stat.S_IWOTH:
        raise CheckpointError(f"{path}: every user may write to it; not loaded (chmod o-w once you trust it)")


def _candidates(directory: Path) -> list[tuple[int, bool, Path]]:
    """(step, whether it is the first choice of that step, path), the newest first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = ((STEP_DIRECTORY.fullmatch(path.name), path) for path in paths)
    return sorted(((int(match[1]), match[2] is None, path) for match, path in found if match), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _reason(fault: BaseException) -> str:
    """The operating system's word where there is one: torch reports a full disk as a wrong file position."""
    cause: BaseException | None = fault
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return (cause.strerror if cause is not None else None) or str(fault)
