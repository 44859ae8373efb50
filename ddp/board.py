"""What each rank is doing, in a page of memory that outlives it. Loads no torch.

A rank that is killed says nothing more. So it writes down all the time which phase of which step it is in: two stores
into a page that others keep mapped. The page is a file beside the outcome that `launch` asked for, where it did, so that
`launch` can read it when every rank is gone; else it has no name. Ranks of a node open each other's through
/proc (see `ddp.roll`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ddp.outcome import OUTCOME_FILE_VARIABLE

PAGE_BYTES = 4096
OF_A_STEP = ("data", "forward", "backward", "all-reduce", "exchange", "measure", "optimizer", "telemetry")
PHASES = ("start", "set-up", *OF_A_STEP, "save", "evaluation", "end")
_INDEX = {phase: index for index, phase in enumerate(PHASES)}
LEFT, FAILED, LOST = (
    1,
    2,
    3,
)  # how a rank ended that could say so: well or by agreement; by an error; for want of another
DIED, STOPPED, SILENT = 1, 2, 3  # what is known of a rank that could not
_NONCE, _PID, _PHASE, _STEP, _ENDED, _CALLED, _LOST_RANK, _LOST_HOW = range(8)  # words of 8 bytes


@dataclass(frozen=True, slots=True)
class Position:
    """A phase and the step that it is of; of evaluation, save and end the last step that was done."""

    phase: str
    step: int

    def __str__(self) -> str:
        if self.phase in OF_A_STEP:
            return f"in {self.phase} of step {self.step}"
        after = f" after step {self.step}" if self.step else ""
        return f"{'at the' if self.phase in ('start', 'end') else 'in'} {self.phase}{after}"


class PhaseBoard:
    """One rank's page. Its owner writes; whoever else has it mapped reads."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor  # for peers to open it by, until `settled`
        self._memory = mmap.mmap(descriptor, PAGE_BYTES)
        self._words = memoryview(self._memory).cast("q")

    @classmethod
    def make(cls, rank: int) -> Self:
        """This process's page: a file that `launch` can find, where that asked for an outcome, else one without a name."""
        descriptor = _named(page_file(rank)) if OUTCOME_FILE_VARIABLE in os.environ else _nameless()
        board = cls(descriptor)
        board._words[_NONCE] = secrets.randbits(62)
        board._words[_PID] = os.getpid()  # last: a page with a pid is a page
        return board

    @property
    def nonce(self) -> int:
        """What a peer knows this page by."""
        return self._words[_NONCE]

    @property
    def pid(self) -> int:
        return self._words[_PID]

    def settled(self) -> None:
        """Every peer has opened the page: the descriptor is no longer needed."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def enter(self, phase: str, step: int) -> None:
        """A phase begins."""
        self._words[_STEP] = step
        self._words[_PHASE] = _INDEX[phase]

    def interrupt(self, phase: str) -> str:
        """`phase` begins in the middle of another, which is returned to go on with; of the same step."""
        before = self._words[_PHASE]
        self._words[_PHASE] = _INDEX[phase]
        return PHASES[before]

    @property
    def position(self) -> Position:
        """Where the owner is, or was when it went."""
        return Position(PHASES[self._words[_PHASE]], self._words[_STEP])

    @property
    def ended(self) -> int:
        """LEFT, FAILED or LOST once the owner has said so, else 0."""
        return self._words[_ENDED]

    def end(self, how: int) -> None:
        """The owner is about to go, and nobody need wonder."""
        self._words[_ENDED] = how

    @property
    def is_at_roll_call(self) -> bool:
        """Whether the owner has noticed that a rank is missing, and is none itself."""
        return bool(self._words[_CALLED])

    def come_to_roll_call(self) -> None:
        self._words[_CALLED] = 1

    @property
    def lost(self) -> tuple[int, int] | None:
        """Rank and fate (DIED, STOPPED, SILENT) of the rank that the owner found missing."""
        how = self._words[_LOST_HOW]
        return (self._words[_LOST_RANK], how) if how else None

    def note_lost(self, rank: int, how: int) -> None:
        self._words[_LOST_RANK] = rank
        self._words[_LOST_HOW] = how


def pid_in(descriptor: int) -> int:
    """The pid that a page's file holds; 0 of one that is not written yet, which may be a hole: not to be mapped."""
    return int.from_bytes(os.pread(descriptor, 8, 8 * _PID), sys.byteorder)


def page_file(rank: int) -> Path:
    """Where a rank that `launch` started has its page."""
    outcome = Path(os.environ[OUTCOME_FILE_VARIABLE])
    return outcome.with_name(f"{outcome.name}.rank.{rank}")


def say_ended(rank: int, how: int) -> None:
    """For a rank that goes without its board at hand: mark the page that `launch` reads, unless it is marked."""
    if OUTCOME_FILE_VARIABLE not in os.environ:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(page_file(rank), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        word = os.pread(descriptor, 8, 8 * _ENDED)
        if word == bytes(8):
            os.pwrite(descriptor, how.to_bytes(8, sys.byteorder), 8 * _ENDED)
        os.close(descriptor)


def _named(path: Path) -> int:
    try:
        path.unlink(missing_ok=True)  # an earlier attempt's, which others may have mapped
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:  # a rank on another node than `launch`
        return _nameless()
    try:
        return _filled(descriptor)
    except OSError:  # no room: `launch` goes without
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return _nameless()


def _nameless() -> int:
    try:
        return _filled(os.memfd_create("ddp-phase", os.MFD_CLOEXEC))
    except OSError:  # refused by a sandbox
        with tempfile.TemporaryFile() as file:
            return _filled(os.dup(file.fileno()))


def _filled(descriptor: int) -> int:
    """With a page's room taken: a store into a hole for which there is none would be a SIGBUS."""
    os.posix_fallocate(descriptor, 0, PAGE_BYTES)
    return descriptor
