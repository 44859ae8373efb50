"""The stages of a sweep: what each varies, how long its trials are, and its ranges, from those before. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddp.sweep.dimensions import Dimension, value_to_toml
from ddp.sweep.sections import SamplerName, StageSection
from ddp.sweep.space import Space, Values
from ddp.sweep.sweep_file import Sweep
from ddp.sweep.trials import Trial, best_of, leading


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage as it is run: the file's, once for each subject where these go in turn.

    Attributes:
        index: from 0, in the order of running.
        name: of its folder and its study.
        varied: keys.
    """

    index: int
    name: str
    section: StageSection
    varied: frozenset[str]
    sampler: SamplerName
    narrow: float
    deadline_seconds: float

    @property
    def length(self) -> tuple[float | None, int | None]:
        """Epochs and steps of a trial; both None where the job's own hold. Trials of one length can be compared."""
        return self.section.epochs, self.section.steps


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What is decided when a stage begins: its space, and how many trials it has."""

    space: Space
    trials: int
    grid: tuple[Values, ...] = ()

    def to_json(self) -> dict[str, Any]:
        ranges = {
            each.key: {"low": each.low, "high": each.high, "choices": list(each.choices)}
            for each in self.space.dimensions
            if each.key in self.space.varied
        }
        return {"ranges": ranges, "fixed": self.space.fixed}


def expand(sweep: Sweep) -> tuple[Stage, ...]:
    """All stages in the order of running."""
    parts: list[tuple[str, StageSection, tuple[str, ...]]] = []
    every = tuple(each.key for each in sweep.dimensions)
    for section in sweep.stages:
        if sweep.section.order == "in_turn" and not section.vary:
            parts += [(f"{section.name}-{name}", section, keys) for name, keys in sweep.section.subjects.items()]
        else:
            parts.append((section.name, section, sweep.keys_of(section.vary) or every))
    return tuple(
        Stage(
            index=index,
            name=name,
            section=section,
            varied=frozenset(keys),
            sampler=section.sampler or sweep.section.sampler,
            narrow=section.narrow or sweep.section.narrow,
            deadline_seconds=section.deadline_seconds or sweep.section.deadline_seconds,
        )
        for index, (name, section, keys) in enumerate(parts)
    )


def plan_stage(
    sweep: Sweep, stage: Stage, before: Sequence[tuple[Stage, Mapping[str, Dimension], Sequence[Trial]]]
) -> StagePlan:
    """The ranges of a stage that begins now.

    A key that an earlier stage varied has a narrower range around the best trial of the stage before; one that is not
    varied now keeps that trial's value.

    Args:
        before: the stages that are done, in order: each with its ranges by key, and its trials.

    Raises:
        UsageError: a grid has too many points.
    """
    best = next((found for _, _, trials in reversed(before) if (found := best_of(trials)) is not None), None)
    values = {} if best is None else best.values
    ranges = tuple(
        _range(each, stage, before, values) if each.key in stage.varied else each for each in sweep.dimensions
    )
    fixed = {key: value for key, value in values.items() if key not in stage.varied}
    return planned(sweep, stage, ranges, fixed)


def restored_plan(sweep: Sweep, stage: Stage, kept: Mapping[str, Any]) -> StagePlan:
    """The plan that `StagePlan.to_json` kept."""
    ranges = tuple(
        replace(each, low=known["low"], high=known["high"], choices=tuple(known["choices"]))
        if (known := kept["ranges"].get(each.key))
        else each
        for each in sweep.dimensions
    )
    return planned(sweep, stage, ranges, dict(kept["fixed"]))


def planned(sweep: Sweep, stage: Stage, ranges: tuple[Dimension, ...], fixed: Values) -> StagePlan:
    space = Space(ranges, stage.varied, fixed, sweep.at(stage.section).job_value)
    grid = tuple(space.grid()) if stage.sampler == "grid" else ()
    return StagePlan(space, len(grid) or stage.section.trials or sweep.section.trials, grid)


def _range(
    whole: Dimension,
    stage: Stage,
    before: Sequence[tuple[Stage, Mapping[str, Dimension], Sequence[Trial]]],
    values: Values,
) -> Dimension:
    earlier = [(ranges[whole.key], trials) for each, ranges, trials in before if whole.key in each.varied]
    if not earlier:
        return whole
    last, trials = earlier[-1]
    if whole.kind == "choice":
        seen = {value_to_toml(each.values[whole.key]) for each in leading(trials) if whole.key in each.values}
        kept = tuple(choice for choice in last.choices if choice in seen)
        return replace(last, choices=kept or last.choices)
    return last.narrowed(whole, values[whole.key], stage.narrow) if whole.key in values else last


def steps_of(epochs: float, examples: int, examples_per_step: int) -> int:
    """Optimizer steps of a length in epochs, at least one."""
    return max(1, math.ceil(epochs * examples / examples_per_step - 1e-9))
