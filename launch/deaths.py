"""Which rank died first, by which signal, and where it was: for when no rank is left to say so.

MPICH's mpirun kills the other ranks at once, Open MPI's after 0.2 s. The ranks' phase boards lie beside the outcome file:
a thread here waits for the end of the processes that they name, and the boards outlive these.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

from ddp.board import PAGE_BYTES, PhaseBoard, pid_in

LOOK_SECONDS = 0.1  # between looks for ranks that are new
_SAID = (r"exitcode\s*: -(\d+) \(pid: {pid}\)", r"exitcode: -(\d+)\) local_rank: \d+ \(pid: {pid}\)")
_SAID_BY_OPENMPI = r"PID {pid} on node \S+ exited on\s+signal (\d+)"


@dataclass(frozen=True, slots=True)
class _Watched:
    rank: int
    file: Path
    inode: int
    board: PhaseBoard


class DeathWatch:
    """Watches the ranks whose boards appear beside `outcome_file`; a context manager."""

    def __init__(self, outcome_file: Path) -> None:
        self._outcome_file = outcome_file
        self._watched: dict[int, _Watched] = {}  # by pidfd
        self._inodes: set[int] = set()
        self._ended: list[list[_Watched]] = []  # in the order of their ends, together what was seen together
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DeathWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for descriptor in self._watched:
            os.close(descriptor)

    def account(self, said: str, code: int) -> str | None:
        """One line about the rank that went first without a word of its own; None where none did.

        Args:
            said: what the launcher wrote.
            code: what it left with.
        """
        for together in self._ended:
            silent = [each for each in together if self._is_newest(each) and not each.board.ended]
            if silent:
                named = [each for each in silent if _signal_said(each.board.pid, said)] or silent
                return ", ".join(_account(each, said, code) for each in named)
        return None

    def signal_of(self, rank: int, said: str, code: int) -> str | None:
        """The name of the signal that ended `rank`, where that can be told."""
        for each in (each for together in self._ended for each in together):
            if each.rank == rank and self._is_newest(each) and not each.board.ended:
                return signal_name(each.board.pid, said, code)
        return None

    def _is_newest(self, each: _Watched) -> bool:
        """Whether a restart has not put another rank in its place."""
        with contextlib.suppress(OSError):
            return each.file.stat().st_ino == each.inode
        return False

    def _watch(self) -> None:
        while not self._over.is_set():
            self._look()
            self._wait()
        self._wait()

    def _look(self) -> None:
        for file in self._outcome_file.parent.glob(f"{self._outcome_file.name}.rank.*"):
            with contextlib.suppress(OSError, ValueError):
                state = file.stat()
                if state.st_ino in self._inodes or state.st_size < PAGE_BYTES:
                    continue
                descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                if not pid_in(descriptor):
                    os.close(descriptor)
                    continue
                board = PhaseBoard(descriptor)
                board.settled()
                self._inodes.add(state.st_ino)
                rank = int(file.name.rpartition(".")[2])
                self._watched[os.pidfd_open(board.pid)] = _Watched(rank, file, state.st_ino, board)

    def _wait(self) -> None:
        poller = select.poll()
        for descriptor in self._watched:
            poller.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poller.poll(0 if self._over.is_set() else 1000 * LOOK_SECONDS)]
        if ended:
            self._ended.append([self._watched.pop(descriptor) for descriptor in ended])
        for descriptor in ended:
            os.close(descriptor)


def signal_name(pid: int, said: str, code: int) -> str | None:
    """The signal that ended `pid`, by the launcher's words, else by its code: MPICH's leaves with 9, a shell's with 137."""
    number = _signal_said(pid, said) or (code - 128 if code > 128 else code if code > 3 else 0)
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return None


def _signal_said(pid: int, said: str) -> int:
    for pattern in (*_SAID, _SAID_BY_OPENMPI):
        if match := re.search(pattern.format(pid=pid), said):
            return int(match[1])
    return 0


def _account(each: _Watched, said: str, code: int) -> str:
    name = signal_name(each.board.pid, said, code)
    return f"rank {each.rank} (pid {each.board.pid}) died{f' by {name}' if name else ''} {each.board.position}"
