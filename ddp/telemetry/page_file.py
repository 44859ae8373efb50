"""A page on the disk, whole at any moment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ddp.errors import UsageError
from ddp.job import redact


def check_page(path: Path) -> None:
    """Refuse a place where `write_page` would fail, before the work whose outcome goes there.

    Raises:
        UsageError: the directory is not there or not to be written in, or `path` is one itself.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a directory: name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: cannot be written: {path.parent} is not yours to write in")


def write_page(path: Path, text: str) -> Path:
    """Write beside and rename, readable by its owner alone, so that a browser never loads half a page; returns `path`.

    Raises:
        UsageError: it cannot be written there, or that is another user's directory; nothing is left behind.
    """
    try:
        if (owner := path.parent.stat().st_uid) != os.geteuid():
            raise UsageError(
                f"{path}: not written, the directory belongs to user {owner}, not to you (user {os.geteuid()}): "
                "copy it and name the copy"
            )
        replace_file(path, redact(text))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def replace_file(path: Path, text: str) -> None:
    """Write beside, readable by its owner alone, and rename; nothing is left behind. Several may do so at a time.

    Raises:
        OSError: it cannot be written there.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
