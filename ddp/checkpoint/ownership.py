"""Files are read where they are this user's own and nobody else can write to them; links are not followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
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
        status, above = path.lstat(), path.parent.stat()
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: no such checkpoint: {reason(fault)}") from None
    _check_own(path, status, stat.S_ISDIR)
    check_folder(path.parent, above)


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
