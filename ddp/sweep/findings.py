"""What a sweep has found: the best trial, what to be warned of, what each dimension matters. From the journal alone.

Trials of different lengths are not compared: the best is looked for among those as long as the latest stage's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddp.sweep.dimensions import Dimension, shown
from ddp.sweep.job_of_trial import best_job, overrides_of, write_job
from ddp.sweep.journal import Journal
from ddp.sweep.planning import Planner
from ddp.sweep.stages import Stage
from ddp.sweep.sweep_file import Sweep
from ddp.sweep.trials import Trial, best_of, ranked
from ddp.telemetry.page_file import write_page

ONE_FOLD = (
    "Trials are ranked on one validation fold, the task's own; the best of many looks better there than it is: judge it "
    "on data that no trial has seen."
)


@dataclass(frozen=True, slots=True)
class StageFound:
    """One stage and its trials.

    Attributes:
        ranges: of the dimensions that it varies.
        importance: share of the cost that each explains; empty where not known.
    """

    stage: Stage
    ranges: tuple[Dimension, ...]
    wanted: int
    trials: tuple[Trial, ...]
    importance: dict[str, float]


@dataclass(frozen=True, slots=True)
class Findings:
    """All of a sweep, as far as it is.

    Attributes:
        metric, goal: what trials are ranked by, and its direction.
        best: None where no trial is complete.
        compared: trials of the best one's length, ranked.
    """

    sweep: Sweep
    metric: str
    goal: str
    stages: tuple[StageFound, ...]
    best: Trial | None
    compared: tuple[Trial, ...]
    warnings: tuple[str, ...]

    def stage_of(self, trial: Trial) -> StageFound:
        return next(each for each in self.stages if each.stage.name == trial.stage)

    def overrides(self, trial: Trial) -> list[str]:
        return overrides_of(self.stage_of(trial).stage, trial.values)


def find(sweep: Sweep, journal: Journal, planner: Planner, goal: str) -> Findings:
    """Read all that the journal has."""
    stages = tuple(
        StageFound(
            stage=stage,
            ranges=tuple(each for each in plan.space.dimensions if each.key in stage.varied),
            wanted=plan.trials,
            trials=tuple(journal.trials(stage.name)),
            importance=journal.importance(stage.name),
        )
        for stage in planner.stages
        if (plan := planner.plan(stage)) is not None
    )
    latest = next((each for each in reversed(stages) if best_of(each.trials) is not None), None)
    alike = [each for each in stages if latest is not None and each.stage.length == latest.stage.length]
    compared = [trial for each in alike for trial in each.trials]
    best = best_of(compared)
    warnings = tuple(dict.fromkeys([*_borders(sweep, stages), *_losses(stages)]))
    return Findings(sweep, sweep.job.evaluation.metric, goal, stages, best, tuple(ranked(compared)), warnings)


def _borders(sweep: Sweep, stages: Sequence[StageFound]) -> Iterator[str]:
    """A best value at an end of what was searched, where the job would take values beyond it."""
    whole = {each.key: each for each in sweep.dimensions}
    last = {each.key: found.stage.index for found in stages for each in found.ranges}
    for found in stages:
        best = best_of(found.trials)
        for dimension in found.ranges if best is not None else ():
            assert best is not None
            if dimension.key not in best.values:
                continue
            value = best.values[dimension.key]
            end = whole[dimension.key].border(value)
            if end is not None and sweep.accepts({**best.values, dimension.key: whole[dimension.key].beyond(end)}):
                yield (
                    f"{dimension.key}: the best value of stage {found.stage.name}, {shown(value)}, lies on the {end} border "
                    f"of its range, {whole[dimension.key].text()}: better ones may lie beyond; widen it there."
                )
            elif end is None and last[dimension.key] == found.stage.index and dimension.border(value) is not None:
                yield (
                    f"{dimension.key}: the best value of stage {found.stage.name}, {shown(value)}, lies on the border of "
                    f"the range that this stage had, {dimension.text()}: give another stage, or a larger narrow."
                )


def _losses(stages: Sequence[StageFound]) -> Iterator[str]:
    """Where so many trials came to nothing that the ranges, or the machine, are to be looked at."""
    for found in stages:
        ended = [trial.result for trial in found.trials if trial.result is not None]
        diverged = sum(each.state == "diverged" for each in ended)
        if 3 * diverged > len(ended):
            yield f"stage {found.stage.name}: {diverged} of {len(ended)} trials diverged: lower the upper ends of rates."
        for result in [each for each in ended if each.state == "failed"][:1]:
            failed = sum(each.state == "failed" for each in ended)
            yield f"stage {found.stage.name}: {failed} of {len(ended)} trials failed, the first one: {result.cause}"


def write_findings(found: Findings, directory: Path) -> None:
    """results.json, and best.toml where there is a best.

    Raises:
        UsageError: they cannot be written there.
    """
    write_page(directory / "results.json", json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    if found.best is not None:
        stage = found.stage_of(found.best).stage
        note = (
            f"The best of {len(found.compared)} trials of the sweep {found.sweep.name}: {stage.name}/{found.best.name}"
        )
        write_job(directory / "best.toml", best_job(found.sweep, stage, found.best), note)


def as_json(found: Findings) -> dict[str, Any]:
    """Plain data; what is not known is null."""
    places = {(trial.stage, trial.number): place for place, trial in enumerate(found.compared, 1)}
    return {
        "sweep": found.sweep.name,
        "metric": found.metric,
        "goal": found.goal,
        "ranked_by": f"{found.sweep.section.value} evaluation of a trial, on one validation fold",
        "best": None if found.best is None else f"{found.best.stage}/{found.best.name}",
        "warnings": list(found.warnings),
        "stages": [
            {
                "name": each.stage.name,
                "trials": each.wanted,
                "ranges": {dimension.key: dimension.text() for dimension in each.ranges},
                "importance": each.importance,
            }
            for each in found.stages
        ],
        "trials": [
            {
                "stage": trial.stage,
                "trial": trial.name,
                "rank": places.get((trial.stage, trial.number)) if trial.is_complete else None,
                "values": trial.values,
                "set": found.overrides(trial),
                **({"state": "running"} if trial.result is None else _known(asdict(trial.result))),
            }
            for each in found.stages
            for trial in each.trials
        ],
    }


def _known(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in table.items()
    }
