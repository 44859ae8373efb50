"""Processes and what is below them, from /proc: their peak memory, those with a mark, and their end. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, whatever sessions and groups they are in."""
    children: dict[int, list[int]] = {}
    for each in _pids():
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{each}/stat").read_text(encoding="ascii", errors="replace")
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(each)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process has had so far (VmHWM); 0 where it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def marked(mark: str) -> list[int]:
    """This user's processes that were started with the environment variable `mark`, NAME=value."""
    found: list[int] = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{pid}")
            if folder.stat().st_uid == os.geteuid() and mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
