"""Which trial comes next, from the journal alone: so a sweep goes on from wherever it was, with any number of masters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddp.errors import DdpError
from ddp.sweep.dimensions import Dimension
from ddp.sweep.journal import Journal
from ddp.sweep.locks import PLANNING_LOCK, FileLock, Masters, held
from ddp.sweep.stages import Stage, StagePlan, expand, plan_stage, restored_plan
from ddp.sweep.sweep_file import Sweep
from ddp.sweep.trials import Trial

HOPELESS_FAILURES = 3  # trials that failed before any did not: something is wrong with all of them

Done = tuple[Stage, Mapping[str, Dimension], Sequence[Trial]]


@dataclass(frozen=True, slots=True)
class Work:
    """A trial that is this master's to run; `again` where another one had begun it."""

    stage: Stage
    trial: Trial
    again: bool


class Planner:
    """Hands out trials. What belongs together in the journal is written under one lock of all masters."""

    def __init__(self, sweep: Sweep, journal: Journal, masters: Masters, directory: Path) -> None:
        self._sweep, self._journal, self._masters = sweep, journal, masters
        self._lock = FileLock(directory / PLANNING_LOCK)
        self._plans: dict[str, StagePlan] = {}
        self._ended_before: dict[str, int] = {}  # trials of each stage, when this master first saw it
        self.stages = expand(sweep)

    def next(self) -> Work | Literal["wait", "done"]:
        """A trial to run; "wait" where other trials have to end first; "done" where none is left.

        Raises:
            DdpError: a stage has nothing to go on from, or all trials fail.
        """
        with held(self._lock):
            done: list[Done] = []
            for stage in self.stages:
                plan = self._plan(stage, done)
                trials = self._journal.trials(stage.name)
                work = self._of_stage(stage, plan, trials)
                if work != "done":
                    return work
                done.append((stage, {each.key: each for each in plan.space.dimensions}, trials))
            return "done"

    def plan(self, stage: Stage) -> StagePlan | None:
        """As it was decided; None where the stage has not begun."""
        if stage.name not in self._plans and (kept := self._journal.plan(stage.name)) is not None:
            self._plans[stage.name] = restored_plan(self._sweep, stage, kept)
        return self._plans.get(stage.name)

    def _plan(self, stage: Stage, done: Sequence[Done]) -> StagePlan:
        if (plan := self.plan(stage)) is None:
            if done and not any(trial.is_complete for trial in done[-1][2]):
                raise DdpError(
                    f"stage {done[-1][0].name}: no trial came to its end, so {stage.name} has nothing to go on from: give "
                    "other ranges, or more trials"
                )
            plan = plan_stage(self._sweep, stage, done)
            self._journal.begin(stage.name, plan)
            self._plans[stage.name] = plan
        return plan

    def _of_stage(self, stage: Stage, plan: StagePlan, trials: Sequence[Trial]) -> Work | Literal["wait", "done"]:
        seed, master = (self._sweep.section.seed, stage.index), self._masters.name
        running = [trial for trial in trials if trial.result is None]
        for trial in running:
            if not self._masters.lives(trial.master):
                claimed = self._journal.claim(trial, plan, stage.sampler, seed, master)
                return "wait" if claimed is None else Work(stage, claimed, again=True)
        ended = sum(trial.result is not None for trial in trials)
        before = self._ended_before.setdefault(stage.name, ended)
        self._check_hope(trials, before if len(trials) < plan.trials else 0)
        if len(trials) < plan.trials:
            return Work(stage, self._journal.ask(stage.name, plan, stage.sampler, seed, master), again=False)
        return "wait" if running else "done"

    def _check_hope(self, trials: Sequence[Trial], before: int) -> None:
        """Failures of `before` this master came count only beside new ones: what caused them may be gone, a full disk for one."""
        ended = [trial.result for trial in trials if trial.result is not None]
        if len(ended) - before >= HOPELESS_FAILURES and all(result.state == "failed" for result in ended):
            raise DdpError(f"every trial so far failed, the last one: {ended[-1].cause}")
