"""Files are read where they are this user's own and nobody else can write to them; links are not followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from ddp.errors import CheckpointError


def open_own(path: Path) -> BufferedReader:
    """Open a file for reading if it is a plain one of this user's; a link is not followed.

    Raises:
        CheckpointError: it is not, or cannot be opened.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: cannot be opened: {reason(fault)}") from None
    try:
        _check_own(path, os.fstat(file.fileno()), stat.S_ISREG)
    except CheckpointError:
        file.close()
        raise
    return file


def check_own_directory(path: Path) -> None:
    """Refuse a checkpoint's directory that is another user's, or lies where every user may put another in its place."""
    try:
        run = path.absolute().parent.parent
        status, above, further = path.lstat(), path.parent.stat(), run.stat()
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: no such checkpoint: {reason(fault)}") from None
    _check_own(path, status, stat.S_ISDIR)
    check_folder(path.parent, above)
    check_folder(run, further)


def check_run(run: Path) -> None:
    """Refuse the directory of a run that would not be opened again: others may write to it, or its `checkpoints` is a link.

    Raises:
        CheckpointError: that, or it cannot be looked at. What is not there is not refused.
    """
    with suppress(FileNotFoundError):
        try:
            status, held = run.stat(), (run / "checkpoints").lstat()
        except FileNotFoundError:
            raise
        except OSError as fault:
            raise CheckpointError(f"{run}: cannot be read: {reason(fault)}") from None
        if status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
            whose = "every user" if status.st_mode & stat.S_IWOTH else "its group"
            raise CheckpointError(f"{run}: {whose} may write to it; not used (chmod 700 once you trust it)")
        if stat.S_ISLNK(held.st_mode):
            link = run / "checkpoints"
            raise CheckpointError(f"{link} is a link, which is not followed: put what it leads to in its place")


def check_folder(folder: Path, status: os.stat_result) -> None:
    """Refuse the folder of all checkpoints where everybody may rename what is in it."""
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise CheckpointError(f"{folder}: every user may replace what is in it; not used (chmod o-w once you trust it)")


def _check_own(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(status.st_mode):
        raise CheckpointError(f"{path}: not a plain file or directory of a checkpoint")
    if status.st_uid != os.geteuid():
        raise CheckpointError(f"{path}: belongs to user {status.st_uid}, not to you (user {os.geteuid()}); not loaded")
    if status.st_mode & stat.S_IWOTH:
        raise CheckpointError(f"{path}: every user may write to it; not loaded (chmod o-w once you trust it)")


def reason(fault: BaseException) -> str:
    """The operating system's word where there is one."""
    return (fault.strerror if isinstance(fault, OSError) else None) or str(fault) or type(fault).__name__
