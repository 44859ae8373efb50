"""Who may touch a sweep's directory: a lock for the journal, and one that each master holds as long as it lives.

Record locks (fcntl), which the kernel drops with the process however that ends, and which NFS has since version 4. So
nothing is left locked by a master that was killed, and the others can tell that its trials are nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ddp.errors import DdpError, UsageError

PLANNING_LOCK = ".planning.lock"  # in the sweep's directory: for what belongs together, and for coming in
PATIENCE_SECONDS = 120.0  # for a lock that masters hold for milliseconds
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class FileLock:
    """A lock between processes, on a file of its own; what Optuna's journal asks of one. Not for threads.

    Closing any other descriptor of the file would drop it: nobody else opens it in the process that holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Wait for it.

        Raises:
            DdpError: another process has it for minutes, or there are no locks on this filesystem.
        """
        descriptor = os.open(self._path, _FLAGS, 0o600)
        until, pause = time.monotonic() + PATIENCE_SECONDS, 0.001
        try:
            while not _taken(descriptor, self._path):
                if time.monotonic() > until:
                    raise DdpError(
                        f"{self._path}: another master has held this lock for {PATIENCE_SECONDS:g} s; end it"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def held(lock: FileLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Masters:
    """This master among those of one sweep; a context manager, after which it counts as gone."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / "masters"
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._lock = FileLock(self._folder / self.name)
        self._gone: set[str] = set()

    def __enter__(self) -> Masters:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            (self._folder / self.name).unlink()
        self._lock.release()

    def lives(self, name: str) -> bool:
        """Whether the master of that name, of this or another node, still runs."""
        if name == self.name:
            return True
        if name not in self._gone and self._is_locked(self._folder / name):
            return True
        self._gone.add(name)
        return False

    def others(self) -> list[str]:
        """Those that run beside this one; what killed ones left is removed."""
        alive: list[str] = []
        for path in sorted(self._folder.iterdir()):
            if path.name == self.name:
                continue
            if self.lives(path.name):
                alive.append(path.name)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        return alive

    def _is_locked(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return not _taken(descriptor, path)
        finally:
            os.close(descriptor)


def _taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise UsageError(
            f"{path}: this filesystem has no locks ({error.strerror}): give another sweep.directory"
        ) from None
    return True
