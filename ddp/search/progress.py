"""What a search tells whoever watches it: a bar on a terminal, a line a trial elsewhere."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ddp.search.store import TrialResult


class SearchProgress:
    """A context manager. A stream that has gone away ends the showing, not the search."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
        self._what, self._done, self._expected = "", 0, 0

    def __enter__(self) -> Self:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.stop()

    def begin(self, what: str, expected: int, workers: int) -> None:
        """A stage of about `expected` trials begins."""
        self._what, self._done, self._expected = what, 0, expected
        self._say(f"{what}: about {_trials(expected)}, {workers} side by side")
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=expected)

    def trial(self, result: TrialResult) -> None:
        """One has finished."""
        self.finished(trial_line(result), failed=result.stopped_because == "failed")

    def finished(self, line: str, *, failed: bool) -> None:
        """A trial has, with this to be said of it."""
        self._done += 1
        if self._bar is None or failed:
            self._say(f"{self._done}/{max(self._done, self._expected)}  {line}")
        if self._bar is not None and self._task is not None:
            with suppress(OSError, ValueError):
                total = max(self._done, self._expected)
                self._bar.update(self._task, completed=self._done, total=total, description=line)

    def end(self) -> None:
        """The stage is over, with fewer trials than expected where they were enough."""
        if self._done < self._expected:
            self._say(f"{self._what}: complete after {_trials(self._done)}")
        if self._bar is not None and self._task is not None:
            with suppress(OSError, ValueError):
                self._bar.update(self._task, completed=self._done, total=max(self._done, 1))

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):
            self._console.print(line, markup=False, soft_wrap=True)


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"


def trial_line(result: TrialResult) -> str:
    """For example: batch 64  learning rate 0.1  seed 0  144 steps to 0.1  1.4 s"""
    parts = [f"batch {result.batch_size}", f"learning rate {result.learning_rate:.3g}", f"seed {result.seed}"]
    reached = [(steps, target) for steps, target in zip(result.steps_to_target, result.targets, strict=True)]
    reached = [pair for pair in reached if math.isfinite(pair[0])]
    if reached:
        parts.append(f"{reached[-1][0]:.0f} steps to {reached[-1][1]:g}")
    match result.stopped_because:
        case "failed":
            return "  ".join([*parts, f"failed: {result.cause}"])
        case "diverged":
            parts.append(f"diverged after {result.steps} steps")
        case "hopeless" | "budget" if result.targets:
            parts.append(f"given up after {result.steps} steps ({result.stopped_because})")
        case _:
            pass
    return "  ".join([*parts, f"{result.seconds:.1f} s"])
