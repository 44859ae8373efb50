"""The roll call between nodes: ranks that lost another one tell each other over the store that they are there.

The store may be gone with the rank or the node that is missing, and a client of it waits for ever then: a thread asks,
and nobody waits for that thread longer than the roll call takes.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ddp.board import PHASES, Position

ROLL_CALL_SECONDS = 1.5
REPORT_SECONDS = 0.25  # to tell the store, on the way out


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank of another node found: the rank that is missing, its fate as in `ddp.board`, and where it was."""

    rank: int
    fate: int
    position: Position | None


class RemoteCall:
    """This rank's part of the roll call with the ranks of other nodes; with none there is only the deadline.

    Args:
        store: of this attempt, that all ranks reach.
        far: the ranks of other nodes.

    Attributes:
        is_unreachable: whether the store failed.
    """

    def __init__(self, store: dist.Store, rank: int, far: tuple[int, ...]) -> None:
        self._store, self._rank, self._far = store, rank, far
        self._heard: dict[int, dict[str, Any]] = {}
        self._deadline = 0.0
        self._asking: threading.Thread | None = None
        self._answered = 0.0
        self._failed = False

    @property
    def address(self) -> str:
        """Where the store is, host:port."""
        server = getattr(self._store, "underlying_store", self._store)
        return f"{getattr(server, 'host', 'this process')}:{getattr(server, 'port', 0)}"

    @property
    def is_unreachable(self) -> bool:
        return bool(self._far) and (self._failed or time.monotonic() - self._answered > ROLL_CALL_SECONDS / 2)

    def begin(self) -> None:
        """Say that this rank is there, and listen for the others."""
        self._deadline = time.monotonic() + ROLL_CALL_SECONDS
        if self._far:
            self._asking = threading.Thread(target=self._ask, name="ddp-roll-call", daemon=True)
            self._asking.start()

    def is_over(self) -> bool:
        """Whether whoever has not come by now is missing."""
        return time.monotonic() > self._deadline

    def missing(self) -> list[int]:
        """Ranks of other nodes that have not come."""
        return [rank for rank in self._far if rank not in self._heard]

    def has_failed(self) -> bool:
        """Whether a rank of another node has an error of its own."""
        return any(said.get("failed") for said in self._heard.values())

    def told(self) -> Told | None:
        """What a rank of another node has found."""
        for said in list(self._heard.values()):
            if "lost" in said:
                phase = said.get("phase")
                position = Position(phase, int(said["step"])) if phase in PHASES else None
                return Told(int(said["lost"]), int(said["fate"]), position)
        return None

    def report(self, lost: Told) -> None:
        """Tell the other nodes what was found here."""
        where = {"phase": lost.position.phase, "step": lost.position.step} if lost.position else {}
        self._say({"lost": lost.rank, "fate": lost.fate, **where})

    def say_failed(self) -> None:
        """This rank has an error of its own: nobody is missing."""
        self._say({"failed": True})

    def _say(self, what: dict[str, Any]) -> None:
        if not self._far:
            return

        def say() -> None:
            with suppress(RuntimeError):
                self._store.set(_key(self._rank), json.dumps(what))

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(REPORT_SECONDS)

    def _ask(self) -> None:
        try:
            self._store.set(_key(self._rank), "{}")
            while not self.is_over():
                for rank in self._far:
                    if self._store.check([_key(rank)]):
                        self._heard[rank] = json.loads(self._store.get(_key(rank)))
                self._answered = time.monotonic()
                time.sleep(0.05)
        except (RuntimeError, ValueError):  # the store is gone: RuntimeError is what c10d raises
            self._failed = True


def _key(rank: int) -> str:
    return f"roll/{rank}"
