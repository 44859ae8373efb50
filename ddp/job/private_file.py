"""Files that only their owner may read: keys and secrets that a job file names and does not hold."""

from __future__ import annotations

import os

from ddp.errors import UsageError
from ddp.job.plain_file import read_plain_file

MOST_BYTES = 1 << 16


def read_private_file(path: str, where: str) -> bytes:
    """What is in `path`.

    Args:
        where: the field that names it, for messages.

    Raises:
        UsageError: it cannot be read, is no plain file, or others may read or change it.
    """
    try:
        return read_plain_file(path, MOST_BYTES, lambda status: _check(status, path, where))
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _check(status: os.stat_result, path: str, where: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(f"{where}: {path} belongs to user {status.st_uid}: name a file of your own")
    # A file of root's may be given to a group, as packages do with the machine's own key.
    allowed = 0o740 if status.st_uid == 0 and os.geteuid() != 0 else 0o700
    if status.st_mode & 0o777 & ~allowed:
        raise UsageError(f"{where}: others may read {path}: run `chmod 600 {path}` first")
