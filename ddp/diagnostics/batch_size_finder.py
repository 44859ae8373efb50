"""The largest batch that a rank's memory holds, found by trying: doubled until one is too large, then bisected.

Batches are tried in a child process (`batch_size_trial`), because on CPU an allocation that is too large is often not
refused: the kernel kills. A child that raises out of memory or is killed says "too large", and the next size
gets a fresh one. A trial is a step of the run's task without other ranks: forward, backward, optimizer, with the
optimizer's state there.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddp.errors import DdpError

PRECISION = 16  # bisecting ends where the ends are closer than a 16th of the lower
FEW, MANY = 2, 3  # examples of each class that a batch should hold


class TrialError(DdpError):
    """A trial failed for another reason than memory: its message says which."""


class OutOfTimeError(TrialError):
    """A trial took longer than what was left."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One batch that was tried; `seconds` of its forward and backward, NaN where it was too large."""

    examples: int
    fits: bool
    seconds: float = float("nan")
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What the child found of the task."""

    device: str
    memory_bytes: int
    training_examples: int
    classes: int | None
    rarest_share: float | None

    def batch_for_classes(self) -> tuple[int, int] | None:
        """The batches that hold 2 and 3 examples of each class on average, of the rarest too; None without classes."""
        if not self.classes:
            return None
        share = self.rarest_share or 1 / self.classes
        return -int(-FEW / share // 1), -int(-MANY / share // 1)


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The end of a search.

    Attributes:
        examples: the largest that fits; 0 where not even one does.
        too_large: the smallest that was tried and does not fit; None where all did.
        ended_by: memory: the two are close; or the training set has no more; or the time was over.
    """

    examples: int
    too_large: int | None
    ended_by: Literal["memory", "training_set", "time"]
    facts: TaskFacts
    trials: tuple[Trial, ...]

    def sentence(self) -> str:
        limit = f"{self.facts.memory_bytes / 2**30:.2g} GiB on {self.facts.device}"
        match self.ended_by:
            case "memory" if not self.examples:
                return f"Not even one example fits a rank's {limit}."
            case "memory":
                return f"The largest batch per rank that fits {limit}: {self.examples:,} ({self.too_large:,} does not)."
            case "training_set":
                return f"The largest batch per rank that fits {limit}: at least {self.examples:,}, the training set."
        if not self.examples:
            return f"Whether a batch fits {limit} was not found out in the time given."
        too_large = f", {self.too_large:,} does not" if self.too_large else ""
        return (
            f"The largest batch per rank that fits {limit}: at least {self.examples:,} (the time was over{too_large})."
        )


def find_largest_batch(try_batch: Callable[[int], Trial], facts: TaskFacts, start: int) -> LargestBatch:
    """Search from `start` examples.

    Args:
        try_batch: raises OutOfTimeError where it cannot be said.
    """
    trials: list[Trial] = []
    fits, too_large = 0, None
    ended_by: Literal["memory", "training_set", "time"] = "memory"
    try:
        while (size := _next(fits, too_large, start, facts.training_examples)) is not None:
            trials.append(try_batch(size))
            if trials[-1].fits:
                fits = size
            else:
                too_large = size
    except OutOfTimeError:
        ended_by = "time"
    else:
        ended_by = "memory" if too_large is not None else "training_set"
    return LargestBatch(fits, too_large, ended_by, facts, tuple(trials))


def _next(fits: int, too_large: int | None, start: int, limit: int) -> int | None:
    if too_large is None:
        wanted = min(2 * fits or start, limit)
        return wanted if wanted > fits else None
    return (fits + too_large) // 2 if too_large - fits > max(1, fits // PRECISION) else None


@dataclass
class BatchTrials:
    """Tries batches of a job's task in child processes, until `seconds` are over. Close it: that ends the child.

    Args:
        local_ranks: that would share the machine's memory.
        memory_bytes: a rank may take; a part of what is free where left out.
    """

    job_file: Path
    local_ranks: int = 1
    seconds: float = 60.0
    memory_bytes: int | None = None
    allow_import: Sequence[str] = ()
    _child: subprocess.Popen[str] | None = None
    _deadline: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def facts(self) -> TaskFacts:
        """Of the task.

        Raises:
            TrialError: it cannot be built here, or not in the memory there is.
        """
        self._child = self._started()
        answer = self._answer(self._child)
        if answer is None or "error" in answer:
            said = "it was killed" if answer is None else answer["error"]
            raise TrialError(f"the task cannot be tried: {said}")
        return TaskFacts(**answer)

    def try_batch(self, examples: int) -> Trial:
        """Whether a batch of so many examples fits.

        Raises:
            OutOfTimeError: not known in time.
            TrialError: the task fails for another reason.
        """
        if self._child is None:
            self.facts()
        child = self._child
        assert child is not None and child.stdin is not None
        child.stdin.write(f"{examples}\n")
        child.stdin.flush()
        answer = self._answer(child)
        if answer is not None and "seconds" in answer:
            return Trial(examples, True, answer["seconds"], answer["peak_bytes"])
        self.close()  # memory that a failed trial holds would count against the next one
        if answer is not None and not answer["out_of_memory"]:
            raise TrialError(f"a batch of {examples:,} cannot be tried: {answer['error']}")
        return Trial(examples, False)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ddp.diagnostics.batch_size_trial", str(self.job_file)]
        command += ["--local-ranks", str(self.local_ranks)]
        command += ["--memory-bytes", str(self.memory_bytes)] if self.memory_bytes else []
        command += [word for module in self.allow_import for word in ("--allow-import", module)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def _answer(self, child: subprocess.Popen[str]) -> dict[str, Any] | None:
        """The child's next line; None where a signal has ended it.

        Raises:
            OutOfTimeError: none comes in time.
            TrialError: it ended by itself without one.
        """
        assert child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, self._deadline - time.monotonic())):
                self.close()
                raise OutOfTimeError(f"not known after {self.seconds:g} s")
        line = child.stdout.readline()
        if line:
            return json.loads(line)
        code = child.wait()
        if code >= 0:
            raise TrialError(f"the process that tries batches ended with code {code} and said nothing")
        return None


def largest_batch(batch_trials: BatchTrials, start: int) -> LargestBatch:
    """Find it, and end the child.

    Raises:
        TrialError: the task cannot be tried.
    """
    with closing(batch_trials):
        facts = batch_trials.facts()
        return find_largest_batch(batch_trials.try_batch, facts, min(start, facts.training_examples))
