"""The directory of one run: made or reopened by rank 0, private to its user, gone again if the run never began.

    runs/                   0755, so that a Prometheus server may list runs/targets
      <run id>/             0700
        job.toml            the job as resolved
        checkpoints/        see ddp/checkpoint
        run.db, log.jsonl, outcome.json, report.html
        trackers/           what TensorBoard, MLflow and Weights & Biases keep
        .lock               held by rank 0 while the run lasts

One run id is one training run. A directory that exists is opened again only to resume it, and only with
the settings that its numbers came from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddp.errors import UsageError
from ddp.job import Job, check_run_id, load_job

# A resumed run may be longer or end otherwise, be watched, stored, computed and carried in another way; all else its numbers depend on.
MAY_CHANGE = (
    "run.id",
    "run.directory",
    "run.epochs",
    "run.steps",
    "run.device",
    "run.threads_per_rank",
    "early_stopping",
    "averaged_weights",
    "precision.compile",
    "precision.activation_checkpointing",
    "data",
    "transport",
    "noise_scale",
    "evaluation",
    "checkpoint",
    "faults",
    "metrics",
    "record",
    "trackers",
)

WRITTEN_FOLDERS = ("checkpoints", "trackers")
WRITTEN = (
    *WRITTEN_FOLDERS,
    "job.toml",
    ".lock",
    "outcome.json",
    "report.html",
    "log.jsonl",
    "run.db",
    "run.db-journal",
    "run.db-shm",
    "run.db-wal",
)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where the files of a run are. Rank 0 gets it from `open_run_directory`, other ranks make it from the path."""

    path: Path
    reopened: bool = False
    _made: tuple[Path, ...] = field(default=(), repr=False)  # directories this process made, innermost first
    _lock: int | None = field(default=None, repr=False)  # descriptor

    @property
    def job_file(self) -> Path:
        return self.path / "job.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def targets(self) -> Path:
        """Beside the runs: one file a run that Prometheus finds it by."""
        return self.path.parent / "targets"

    def discard(self) -> None:
        """Remove what opening it made, with all that is in the run's own directory; a reopened one stays."""
        if not self._made:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for made in (self.targets, *self._made[1:]):
            with contextlib.suppress(OSError):  # another run lives there by now
                made.rmdir()

    def close(self) -> None:
        """Let another process resume the run. The end of this process does the same."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)


def open_run_directory(job: Job, run_id: str, *, resume: bool, patience_seconds: float = 0.0) -> RunDirectory:
    """Make the run's directory, or open it again where `resume` is true. Rank 0 alone calls this.

    Waits `patience_seconds` for another process to let go of it.

    Raises:
        UsageError: it exists and `resume` is false; it cannot be made; it is a link, another user's, or open to
            everyone; it is in use; or `job` differs from the run's own in what its numbers depend on.
    """
    path = Path(job.run.directory) / _checked(run_id)
    try:
        made = _make(path)
        if not made:
            _check_reopened(path, resume)
            _check_contents(path)
    except OSError as fault:
        raise UsageError(f"run.directory: cannot make {path}: {fault.strerror}") from None
    run = RunDirectory(path, not made, made)
    try:
        run = replace(run, _lock=_take_lock(path, patience_seconds))
        if run.job_file.exists():
            _check_same_numbers(run, job)
        _write_job(run.job_file, job)
    except (OSError, UsageError) as fault:
        run.close()
        run.discard()
        if isinstance(fault, UsageError):
            raise
        raise UsageError(f"run.directory: cannot write to {path}: {fault.strerror}") from None
    return run


@contextlib.contextmanager
def discarded_on_usage_error(run: RunDirectory) -> Iterator[RunDirectory]:
    """Around a run: one that could not begin leaves nothing behind, one with a checkpoint keeps all it has."""
    try:
        yield run
    except UsageError:
        run.close()
        if not any(run.checkpoints.glob("step-*")):
            run.discard()
        raise


def changed_settings(before: Job, now: Job) -> list[str]:
    """One `field: before -> now` for each difference that may not be in a resumed run."""
    old, new = flat(before.model_dump()), flat(now.model_dump())
    differing = [key for key in (*new, *(key for key in old if key not in new)) if old.get(key) != new.get(key)]
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in differing
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)
    ]


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keyed by field path."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _checked(run_id: str) -> str:
    try:
        return check_run_id(run_id)
    except ValueError as fault:
        raise UsageError(f"run.id: {fault}") from None


def _make(path: Path) -> tuple[Path, ...]:
    """Make `path` and the directories above it; those made, innermost first, none if `path` was there."""
    if path.is_symlink() or path.exists():
        return ()
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    made: list[Path] = []
    for directory in reversed(missing):
        mode = 0o700 if directory == path else 0o755
        try:
            directory.mkdir(mode)
            directory.chmod(mode)  # whatever the umask took away
            made.insert(0, directory)
        except FileExistsError:
            if directory == path:
                return ()
    return tuple(made)


def _check_reopened(path: Path, resume: bool) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path} is not a directory: choose another run.id or run.directory")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to user {status.st_uid}: choose another run.id or run.directory")
    if status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        whose = "every user" if status.st_mode & stat.S_IWOTH else "its group"
        raise UsageError(f"{path}: {whose} may write to it; make it yours alone (chmod 700) or choose another run.id")
    if not resume:
        raise UsageError(f"{path} exists: continue that run with --resume auto, or choose another run.id")


def _check_contents(path: Path) -> None:
    """What the run writes is there as plain files and folders of our own, or not at all: a link could lead anywhere."""
    for name in WRITTEN:
        with contextlib.suppress(FileNotFoundError):
            status = (path / name).lstat()
            is_kind = stat.S_ISDIR if name in WRITTEN_FOLDERS else stat.S_ISREG
            if stat.S_ISLNK(status.st_mode):
                raise UsageError(f"{path / name} is a link, which is not followed: put what it leads to in its place")
            if not is_kind(status.st_mode):
                kind = "folder" if name in WRITTEN_FOLDERS else "plain file"
                raise UsageError(f"{path / name} is no {kind}: move it away, or choose another run.id")
            if status.st_uid != os.geteuid():
                raise UsageError(f"{path / name} belongs to user {status.st_uid}: choose another run.id")


def _take_lock(path: Path, patience_seconds: float) -> int | None:
    """A record lock: it goes with this process, and is not handed to data-loader workers. None where unsupported."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            os.close(descriptor)
            raise UsageError(
                f"{path} is in use by a run that has not ended: wait for it, or choose another run.id"
            ) from None
        except OSError:
            os.close(descriptor)
            return None


def _check_same_numbers(run: RunDirectory, job: Job) -> None:
    if changed := changed_settings(load_job(run.job_file), job):
        raise UsageError(
            f"{run.path} cannot be resumed with other settings than it was started with; take these back or "
            "choose another run.id:\n" + "\n".join(f"  {line}" for line in changed)
        )


def _write_job(path: Path, job: Job) -> None:
    partial = path.with_name(".job.toml.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # left by a kill
    with open(
        os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(job.to_toml())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
