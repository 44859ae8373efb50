"""What a case came to, and what a row of the table is. Loads no torch."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


class UnexpectedError(AssertionError):
    """A run did not do what it promises; the message holds what it did instead."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one case ended; `seconds` from the fault to what the row waits for, `what` for a person."""

    ok: bool
    seconds: float
    what: str


@dataclass(frozen=True)
class Row:
    """One fault of the table.

    Attributes:
        name: one word, for the command line.
        fault, promise: what is done to a run, and what has to come of it.
        soak_cases: how many the whole soak runs.
        make: the cases of a seed; the first ones differ from each other as far as they can.
        check: runs a case in an empty folder and returns the seconds from the fault on and a note; raises
            UnexpectedError otherwise.
        hindrance: why it cannot run on this machine, None where it can.
    """

    name: str
    fault: str
    promise: str
    soak_cases: int
    make: Callable[[random.Random, int], Sequence[Any]]
    check: Callable[[Any, Path], tuple[float, str]]
    hindrance: Callable[[], str | None] = lambda: None

    def cases(self, seed: int, count: int) -> list[Any]:
        """So many parameter sets, the same for the same seed; a shorter list is the beginning of a longer one."""
        return list(self.make(random.Random(f"{self.name} {seed}"), count))

    def run(self, case: Any, folder: Path) -> Verdict:
        """One case in `folder`, which is made; whatever it comes to, it is a verdict."""
        folder.mkdir(parents=True)
        began = time.monotonic()
        try:
            seconds, note = self.check(case, folder)
        except UnexpectedError as unexpected:
            return Verdict(False, time.monotonic() - began, f"{case}: {unexpected}")
        except Exception:  # a scenario's own defect must not cost the cases that come after it
            return Verdict(False, time.monotonic() - began, f"{case}: {traceback.format_exc()}")
        return Verdict(True, seconds, note)


def expect(condition: object, what: str) -> None:
    """Raise an UnexpectedError that says `what` unless `condition` is true."""
    if not condition:
        raise UnexpectedError(what)


def dealt(generator: random.Random, kinds: Sequence[Value], count: int) -> list[Value]:
    """`count` of `kinds` in random order, each once before any comes again."""
    drawn: list[Value] = []
    while len(drawn) < count:
        drawn += generator.sample(kinds, len(kinds))
    return drawn[:count]
