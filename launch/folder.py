"""The folder in which one attempt's ranks and `launch` tell each other things: the outcome, the ranks' boards, a log.

`launch` holds a lock on it as long as it lives, which the kernel drops however that ends. So the next `launch` can
tell what a killed one left behind from what another one is using, without trusting process ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from ddp.errors import DdpError

PREFIX = "ddp-launcher-"  # not ddp-launch-: earlier versions hold no lock on theirs


@contextlib.contextmanager
def private_folder() -> Generator[Path]:
    """A new folder, gone afterwards; before that, those of this user which a killed `launch` left are removed.

    Raises:
        DdpError: it cannot be made.
    """
    with contextlib.suppress(OSError):
        remove_stale(Path(tempfile.gettempdir()))
    try:
        folder, descriptor = _made()
    except OSError as fault:
        raise DdpError(f"no folder can be made where TMPDIR says or in /tmp: {fault.strerror}; make room") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_stale(directory: Path) -> list[Path]:
    """Remove this user's folders whose lock nobody holds."""
    removed: list[Path] = []
    for path in sorted(directory.glob(f"{PREFIX}*")):
        try:
            descriptor = _opened(path)
        except OSError:
            continue  # gone by itself, a link, or another user's
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _is_locked(descriptor, path):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
        except OSError:
            continue  # in use, or on a filesystem without locks
        finally:
            os.close(descriptor)
    return removed


def _made() -> tuple[Path, int]:
    """The folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            descriptor = _opened(folder)
        except FileNotFoundError:
            continue  # another `launch` took it for stale
        try:
            if _is_locked(descriptor, folder):
                return folder, descriptor
        except BlockingIOError:
            pass  # it is about to
        except OSError:  # a filesystem without locks: then nobody removes it as stale either
            return folder, descriptor
        os.close(descriptor)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_locked(descriptor: int, path: Path) -> bool:
    """Take the lock; whether the open folder is still the one at `path`.

    Raises:
        BlockingIOError: another holds it.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    return False
