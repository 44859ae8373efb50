"""Trials as values: what each was, what came of it, and which of them are the best. No torch, no Optuna."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ddp.sweep.space import Values

State = Literal["complete", "pruned", "diverged", "failed"]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """How a trial ended. Numbers that are not known are NaN.

    Attributes:
        state: "complete"; "pruned", ended early because others were better by then; "diverged"; "failed": crashed, hung,
            killed or refused.
        cause: in words, of all but "complete".
        value: of evaluation.metric on the validation set, of the evaluation that the trial is ranked by.
        cost: what is minimised: `value`, negated where more is better.
        training_value: of the same metric on a sample of the training set, of the same evaluation.
        epochs: seen by then of the training set.
        seconds: of the trial's processes from start to end, over all attempts at it.
        peak_memory_bytes: peak RSS of its largest process, of a fork with what it shares; 0 where not known.
    """

    state: State
    cause: str = ""
    value: float = math.nan
    cost: float = math.nan
    validation_loss: float = math.nan
    training_value: float = math.nan
    training_loss: float = math.nan
    epochs: float = math.nan
    steps: int = 0
    seconds: float = math.nan
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial of a stage; `result` is None while it runs.

    Attributes:
        values: of the dimensions that count in it.
        master: who runs it, see `locks`.
        spent_seconds: by earlier attempts, which were stopped with their master.
    """

    stage: str
    number: int
    values: Values
    master: str = ""
    spent_seconds: float = 0.0
    result: TrialResult | None = None

    @property
    def name(self) -> str:
        return f"trial-{self.number:04d}"

    def run_directory(self, directory: Path) -> Path:
        return directory / self.stage / self.name

    @property
    def is_complete(self) -> bool:
        return self.result is not None and self.result.state == "complete"

    @property
    def cost(self) -> float:
        """Infinite where there is none."""
        cost = math.nan if self.result is None else self.result.cost
        return math.inf if math.isnan(cost) else cost


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Complete ones from the best on, then pruned ones, then the rest; those that run are left out."""
    order = {"complete": 0, "pruned": 1, "diverged": 2, "failed": 3}
    ended = [(trial, trial.result) for trial in trials if trial.result is not None]
    return [trial for trial, _ in sorted(ended, key=lambda each: (order[each[1].state], each[0].cost, each[0].number))]


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The complete one of the least cost; of equals the first."""
    complete = [trial for trial in trials if trial.is_complete]
    return min(complete, key=lambda trial: (trial.cost, trial.number), default=None)


def leading(trials: Sequence[Trial]) -> list[Trial]:
    """The best quarter of the complete ones, three at least."""
    complete = [trial for trial in ranked(trials) if trial.is_complete]
    return complete[: max(3, math.ceil(len(complete) / 4))]


def result_from(table: dict[str, Any]) -> TrialResult:
    """What a journal holds of one; keys of other versions are passed over."""
    known = {field.name for field in fields(TrialResult)}
    return TrialResult(**{name: value for name, value in table.items() if name in known})
