"""Files that somebody else may have named: read without waiting for ever, and no more than is reasonable.

A name may be that of a device without an end, of a pipe that nobody writes to, or of far too much.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

PIPE_SECONDS = 60.0  # for all of it to come through a pipe


def read_plain_file(
    path: str | Path, most_bytes: int, check: Callable[[os.stat_result], None] | None = None, *, pipes: bool = False
) -> bytes:
    """What is in `path`.

    Args:
        check: looks at the file that was opened, before it is read.
        pipes: a pipe that somebody writes to will do as well, as a shell makes for `<(command)`.

    Raises:
        OSError: it cannot be read.
        ValueError: the name is no path, it is not a plain file, has too many bytes, or nothing comes through a pipe.
    """
    with opened_plain_file(path, pipes=pipes) as descriptor:
        status = os.fstat(descriptor)
        is_pipe = stat.S_ISFIFO(status.st_mode)
        if check is not None:
            check(status)
        content = _read(descriptor, most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    if is_pipe and not content:
        raise ValueError("it is a pipe that nobody writes to")
    return content


@contextmanager
def opened_plain_file(path: str | Path, *, pipes: bool = False) -> Generator[int]:
    """A descriptor to read `path` from, for what is too large to be had at once.

    Raises:
        OSError, ValueError: as `read_plain_file`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode) and not (pipes and stat.S_ISFIFO(status.st_mode)):
            raise ValueError("it is not a plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, most_bytes: int) -> bytes:
    content, deadline = bytearray(), time.monotonic() + PIPE_SECONDS
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    while len(content) < most_bytes:
        try:
            piece = os.read(descriptor, min(most_bytes - len(content), 1 << 20))
        except BlockingIOError:  # a pipe that somebody has open and is not done with
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(1000 * left):
                raise ValueError(f"not all of it came through the pipe within {PIPE_SECONDS:g} s") from None
            continue
        if not piece:
            break
        content += piece
    return bytes(content)
