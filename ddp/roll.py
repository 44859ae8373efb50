"""Who is missing: every rank of a run knows where the others are, and finds out which of them was lost, and where.

What c10d says when a rank dies ("Connection closed by peer") names nobody. Here each rank of a node holds a descriptor of
every other's process (a pidfd) and its phase board. A thread waits for a process that ends without having
said so: that rank died, in the phase that its board still shows, and the outcome is written at once, as a
launcher may kill the survivors within 0.2 s. Who does not die but stays silent is found by a roll call: ranks that noticed come,
and who has not come in time is missing. A rank that merely waits itself is named by nobody, as long as another one is
missing that does not wait. Between nodes the roll call goes over the store (`ddp.roll_call`).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ddp import outcome
from ddp.board import DIED, FAILED, LEFT, LOST, OF_A_STEP, SILENT, STOPPED, PhaseBoard, Position
from ddp.errors import DdpError, PeerLostError
from ddp.process_group import is_peer_gone
from ddp.roll_call import RemoteCall, Told
from ddp.transport.nodes import Place, gather, kernel_number, places
from ddp.transport.segment import open_of

PATIENCE_SECONDS = 10.0  # for a survivor to finish what it is at, a save perhaps, and find out by itself
WAITING = ("all-reduce", "exchange")
_FATES = {DIED: "died", STOPPED: "is stopped (by SIGSTOP, or a debugger)", SILENT: "does not answer, and was last seen"}


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another rank of this node."""

    place: Place
    board: PhaseBoard
    pidfd: int | None

    def has_died(self) -> bool:
        """Whether it has ended without a word."""
        return self.pidfd is not None and _is_over(self.pidfd) and not self.board.ended

    def is_stopped(self) -> bool:
        with suppress(OSError):
            return (
                Path(f"/proc/{self.place.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
            )
        return False

    def is_accounted_for(self) -> bool:
        return self.board.is_at_roll_call or bool(self.board.ended)


class Roll:
    """The ranks of a run, seen from one of them; from `open_roll`.

    Attributes:
        run_directory: where the outcome goes too, once it is known.
    """

    def __init__(
        self, board: PhaseBoard, ranks: tuple[Place, ...], rank: int, near: Mapping[int, Neighbour], remote: RemoteCall
    ) -> None:
        self.board, self.rank = board, rank
        self.run_directory: Path | None = None
        self._ranks, self._near, self._remote = ranks, near, remote
        self._found: PeerLostError | None = None
        self._lock = threading.Lock()
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        self._watcher = threading.Thread(target=self._watch, name="ddp-roll", daemon=True)
        if near:
            self._watcher.start()

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """What happens in here for want of another rank is raised as a PeerLostError that names it."""
        try:
            yield
        except BaseException as error:
            named = self._explained(error)
            is_lost = isinstance(named, PeerLostError)
            self.board.end(LOST if is_lost else FAILED)
            if not is_lost:
                self._remote.say_failed()
            if named is error:
                raise
            raise named from error
        else:
            self.board.end(LEFT)
        finally:
            self._close()

    def _explained(self, error: BaseException) -> BaseException:
        is_lost = isinstance(error, PeerLostError) or is_peer_gone(error)
        if not is_lost and (self._found is None or isinstance(error, DdpError)):
            return error
        found = self._call(getattr(error, "lost_rank", None))
        seen = f"rank {self.rank} was {self.board.position}: {_first_line(error)}"
        if found is None:
            if isinstance(error, DdpError):
                return error
            found = PeerLostError(f"lost another rank, although all answer; {seen}")
        elif found is not self._found:  # that is written down already
            found.args = (f"{found}; {seen}",)
        outcome.annotate(found, step=self._steps_done(), run_directory=getattr(error, "run_directory", None))
        return found

    def _steps_done(self) -> int:
        position = self.board.position
        return position.step - (position.phase in OF_A_STEP)

    def _call(self, suspect: int | None) -> PeerLostError | None:
        """The roll call: who is missing. None where everybody has come, or has an error of its own to show."""
        self.board.come_to_roll_call()
        self._remote.begin()
        while True:
            if found := self._certain() or self._told():
                return found
            missing = [rank for rank, each in self._near.items() if not each.is_accounted_for()]
            missing += self._remote.missing()
            if not missing or self._remote.has_failed() or self._has_failed():
                return None
            if self._remote.is_over():
                return self._missing(missing, suspect)
            time.sleep(0.02)

    def _has_failed(self) -> bool:
        return any(each.board.ended == FAILED for each in self._near.values())

    def _certain(self) -> PeerLostError | None:
        """A rank of this node that is dead; the watcher may have been quicker."""
        with self._lock:
            dead = [rank for rank, each in self._near.items() if each.has_died()]
            if self._found is None and dead:
                self._found = self._lost(dead, DIED)
                self._found.consequence = False  # there is no better account to wait for
                outcome.annotate(self._found, step=self._steps_done())
            return self._found

    def _told(self) -> PeerLostError | None:
        """What another rank, here or on another node, has found."""
        for each in self._near.values():
            if each.board.lost is not None and each.board.lost[0] != self.rank:
                return self._lost([each.board.lost[0]], each.board.lost[1])
        told = self._remote.told()
        if told is None or told.rank == self.rank:
            return None
        return self._lost([told.rank], told.fate, told.position)

    def _missing(self, missing: list[int], suspect: int | None) -> PeerLostError:
        """Who did not come, without those that may only wait themselves."""
        if suspect in missing:
            missing = [suspect]
        stopped = [rank for rank in missing if rank in self._near and self._near[rank].is_stopped()]
        if stopped:
            found = self._lost(stopped, STOPPED)
            found.consequence = False  # what it says itself when it goes on is none of a cause
            for rank in stopped:  # torchrun's SIGTERM would not reach it, and 30 s pass
                with suppress(OSError):
                    os.kill(self._ranks[rank].pid, signal.SIGCONT)
            return found
        idle = [rank for rank in missing if rank not in self._near or not self._waits(rank)]
        return self._lost(idle or missing, SILENT)

    def _waits(self, rank: int) -> bool:
        here, there = self.board.position, self._near[rank].board.position
        return there.phase in WAITING and there.step >= here.step

    def _lost(self, ranks: list[int], fate: int, position: Position | None = None) -> PeerLostError:
        self.board.note_lost(ranks[0], fate)
        self._remote.report(Told(ranks[0], fate, self._position(ranks[0]) or position))
        what = ", ".join(self._account(rank, fate, position) for rank in ranks)
        if fate == SILENT and self._remote.is_unreachable:
            what += f"; nor did the store at {self._remote.address}, over which nodes ask each other"
        return PeerLostError(what, lost_rank=ranks[0])

    def _account(self, rank: int, fate: int, position: Position | None) -> str:
        position = self._position(rank) or position
        how = _FATES[fate] if position or fate != SILENT else "does not answer"
        return f"{self._ranks[rank]} {how}{f' {position}' if position else ''}"

    def _position(self, rank: int) -> Position | None:
        return self._near[rank].board.position if rank in self._near else None

    def _watch(self) -> None:
        """A thread: wait for the death of a rank of this node, write it down, and see that this rank ends too."""
        poller = select.poll()
        poller.register(self._reading, select.POLLIN)
        for each in self._near.values():
            if each.pidfd is not None:
                poller.register(each.pidfd, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poller.poll()]
            if self._reading in ready:
                return
            if (found := self._certain()) is not None:
                break
            for descriptor in ready:  # went with an account of its own
                poller.unregister(descriptor)
        mine = outcome.failure(found, self.rank, len(self._ranks))
        file = outcome.record(mine, self.run_directory)
        poller = select.poll()
        poller.register(self._reading, select.POLLIN)
        if not poller.poll(1000 * PATIENCE_SECONDS):
            if outcome.OUTCOME_FILE_VARIABLE not in os.environ and (file is None or outcome.read(file) == mine):
                sys.stderr.write(f"{mine.message()}\n")
                sys.stderr.flush()
            self.board.end(LOST)
            os._exit(mine.code)

    def _close(self) -> None:
        os.write(self._writing, b"\0")
        if self._watcher.is_alive():
            self._watcher.join(1.0)


def open_roll(board: PhaseBoard, store: dist.Store) -> Roll:
    """Show every rank of the default group this rank's board, and open those of this node. Collective."""
    rank, ranks = dist.get_rank(), places(None)
    pages = gather(np.array([kernel_number(), board.pid, board.descriptor, board.nonce]), None)
    near: dict[int, Neighbour] = {}
    for other, page in enumerate(pages):
        if other != rank and page[0] == pages[rank][0]:  # under another kernel there is nothing to try
            descriptor = open_of(*(int(number) for number in page[1:]))
            if descriptor >= 0:
                near[other] = Neighbour(ranks[other], PhaseBoard(descriptor), _pidfd_of(ranks[other].pid))
                near[other].board.settled()
    gather(np.zeros(1, np.int64), None)  # all have opened what they can
    board.settled()
    far = tuple(other for other in range(len(ranks)) if other != rank and other not in near)
    return Roll(board, ranks, rank, near, RemoteCall(store, rank, far))


def _pidfd_of(pid: int) -> int | None:
    with suppress(OSError):  # refused by a sandbox: the deadlines serve
        return os.pidfd_open(pid)
    return None


def _is_over(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
