"""One trial while it runs: what its record says, when it is asked to stop and why, and what it came to.

The master looks at a trial's record from outside. To end one early it sends the signal that stops any run: a rank that
gets it says so in the step's row, so all ranks stop after the same step.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ddp import outcome
from ddp.errors import DivergedError, StoppedError
from ddp.search.workers import describe_end
from ddp.sweep.launching import Running
from ddp.sweep.run_record import Progress, changed_at, cost_of, measured, read_progress
from ddp.sweep.sections import SweepSection
from ddp.sweep.stages import Stage
from ddp.sweep.trials import Trial, TrialResult

FROM_OUTSIDE = " (stopped from outside)"  # the end of a cause

Asked = Literal["", "pruned", "not finite", "deadline", "silent", "stopped"]


@dataclass(slots=True)
class Watched:
    """A trial and its processes.

    Attributes:
        folder: what its ranks and this master tell each other in; gone at the end.
        slot: of this master's, while it runs.
        asked: why it was asked to stop.
    """

    stage: Stage
    trial: Trial
    running: Running
    section: SweepSection
    metric: str
    goal: str
    run_directory: Path
    folder: Path
    slot: int
    began: float = field(default_factory=time.monotonic)
    asked: Asked = ""
    asked_at: float = math.inf
    reported: int = 0  # evaluations
    _seen: tuple[int, ...] = ()
    _seen_at: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """By all attempts so far."""
        return self.trial.spent_seconds + time.monotonic() - self.began

    def look(self, report: Callable[[Trial, int, float], bool]) -> TrialResult | None:
        """Its result once it has ended; asks it to stop, and kills it, where that is due.

        Args:
            report: takes the number and the cost of an evaluation, and says whether the trial is to be pruned.
        """
        code = self.running.exit_code()
        if code is not None:
            result = self._result(code)
            shutil.rmtree(self.folder, ignore_errors=True)
            return result
        now = time.monotonic()
        if (seen := changed_at(self.run_directory)) != self._seen:
            self._seen, self._seen_at = seen, now
            self._report(report)
        elif now - self._seen_at > self.section.silence_seconds:
            self.ask("silent")
        if self.seconds > self.stage.deadline_seconds:
            self.ask("deadline")
        if now - self.asked_at > self.section.stop_seconds:
            self.running.kill()
        return None

    def ask(self, why: Asked) -> None:
        """To save and stop; the first reason counts."""
        if not self.asked:
            self.asked, self.asked_at = why, time.monotonic()
            self.running.stop()

    def _report(self, report: Callable[[Trial, int, float], bool]) -> None:
        progress = read_progress(self.run_directory)
        for record in progress.validation[self.reported :]:
            self.reported += 1
            cost = cost_of(record, self.metric, self.goal)
            if not math.isfinite(cost):
                self.ask("not finite")
            elif report(self.trial, self.reported, cost):
                self.ask("pruned")

    def _result(self, code: int) -> TrialResult:
        progress = read_progress(self.run_directory)
        numbers = measured(progress, self.metric, self.goal, self.section.value)
        state, cause = self._verdict(code, progress, numbers.cost)
        return TrialResult(
            state=state,
            cause=cause,
            steps=progress.steps,
            seconds=self.seconds,
            peak_memory_bytes=self.running.peak_memory_bytes,
            **asdict(numbers),
        )

    def _verdict(
        self, code: int, progress: Progress, cost: float
    ) -> tuple[Literal["complete", "pruned", "diverged", "failed"], str]:
        """How it ended, by what its ranks said of it first, and by its exit code where they said nothing."""
        said = outcome.read(self.folder / outcome.FILE_NAME)
        ended = said.code if said is not None else code
        if ended == 0:
            if math.isfinite(cost):
                return "complete", ""
            what = f"its {self.metric} on the validation set is not finite" if progress.validation else "no evaluation"
            return ("diverged" if progress.validation else "failed"), what
        if ended == DivergedError.exit_code or self.asked == "not finite":
            return "diverged", said.line() if said is not None and said.code != StoppedError.exit_code else "not finite"
        if self.asked == "pruned":
            return "pruned", f"after evaluation {self.reported}: others were better by then"
        if self.asked == "deadline":
            return "failed", f"not done within its deadline of {self.stage.deadline_seconds:g} s"
        if self.asked == "silent":
            return "failed", f"hung: nothing new in its record for {self.section.silence_seconds:g} s"
        if said is not None and said.code:
            return "failed", f"{said.line()}{FROM_OUTSIDE if ended == StoppedError.exit_code else ''}"
        return "failed", f"{describe_end(code)}; see {self.trial.name}.log"
