"""How a Prometheus server finds a run: one file_sd target list a run, in `runs/targets/`.

The run holds a lock on its file for as long as it lives, which the kernel drops however the process ends.
So the next run can tell a file that a dead run left behind from a live one, without trusting process ids
(they are reused, and mean nothing across containers).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass
class Target:
    """A published target list; `close` takes it away. `path` is None where it could not be written."""

    path: Path | None
    _descriptor: int = -1

    def close(self) -> None:
        """Safe to call twice, and after another run of the same id has put its own file there."""
        path, self.path = self.path, None
        if path is None:
            return
        try:
            _unlink_if_same(path, self._descriptor)
        except OSError as error:
            log.warning("%s: cannot remove the target list: %s", path, error.strerror)
        finally:
            os.close(self._descriptor)


def target_list(run_id: str, address: str, scheme: str = "http") -> str:
    """The file_sd text of one run that serves its metrics on `address` (host:port); https is said where it is that."""
    labels = {"run": run_id} if scheme == "http" else {"run": run_id, "__scheme__": scheme}
    return json.dumps([{"targets": [address], "labels": labels}], indent=2) + "\n"


def publish(directory: Path, run_id: str, address: str, scheme: str = "http") -> Target:
    """Write `directory`/<run id>.json, after removing what dead runs left there.

    A folder that this makes gets mode 0755 and the file 0644 whatever the umask: the server runs as its own
    user. A failure is a warning: training does not depend on being watched.
    """
    path = directory / f"{run_id}.json"
    try:
        if directory.is_symlink():
            raise OSError(errno.ELOOP, "the folder is a link")
        _make_readable_directory(directory)
        remove_stale(directory)
        return Target(path, _write_locked(path, target_list(run_id, address, scheme)))
    except OSError as error:
        log.warning("%s: cannot write the target list, Prometheus will not find this run: %s", path, error.strerror)
        return Target(None)


def remove_stale(directory: Path) -> list[Path]:
    """Remove the target lists whose run is dead, which is those that nobody holds the lock of."""
    removed: list[Path] = []
    for path in sorted(directory.glob("*.json")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # gone by itself, or another user's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _unlink_if_same(path, descriptor):
                removed.append(path)
        except OSError:
            continue  # held by a live run, or a filesystem without locks: leave it
        finally:
            os.close(descriptor)
    return removed


def _make_readable_directory(directory: Path) -> None:
    missing = [folder for folder in (directory.parent, directory) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        folder.chmod(0o755)


def _write_locked(path: Path, text: str) -> int:
    """Put `text` at `path` in one rename and return the descriptor that holds its lock."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks: then nobody removes it as stale either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, text.encode())
        os.fchmod(descriptor, 0o644)
        os.rename(temporary, path)
    except BaseException:
        os.close(descriptor)
        Path(temporary).unlink(missing_ok=True)
        raise
    return descriptor


def _unlink_if_same(path: Path, descriptor: int) -> bool:
    """Unlink `path` unless it has been replaced by another file than the open one."""
    try:
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True
