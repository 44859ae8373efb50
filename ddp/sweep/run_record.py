"""What a trial's `run.db` says of it, also while it trains: its evaluations, and how far it is. Nothing is written.

A record that is being made, or that is damaged, says nothing yet: that is no reason to end a sweep.
"""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddp.errors import DdpError
from ddp.telemetry.recording import open_recording, read_evaluations
from ddp.telemetry.records import EvaluationRecord
from ddp.telemetry.station import RECORD

Which = Literal["best", "last"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What has been recorded.

    Attributes:
        validation, training: evaluations in order; the n-th of each are of the same weights where both were taken.
        steps: the last one.
    """

    validation: tuple[EvaluationRecord, ...] = ()
    training: tuple[EvaluationRecord, ...] = ()
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluation's numbers, NaN where they were not taken."""

    value: float = math.nan
    cost: float = math.nan
    validation_loss: float = math.nan
    training_value: float = math.nan
    training_loss: float = math.nan
    epochs: float = math.nan


def read_progress(run_directory: Path) -> Progress:
    """All that there is by now; nothing where there is no record that can be read."""
    with suppress(DdpError, sqlite3.Error, OSError), closing(open_recording(run_directory / RECORD)) as database:
        evaluations = list(read_evaluations(database))
        (steps,) = database.execute("SELECT max(step) FROM steps").fetchone()
        validation = tuple(each for each in evaluations if each.split == "validation")
        training = tuple(each for each in evaluations if each.split == "training")
        return Progress(validation, training, steps or 0)
    return Progress()


def changed_at(run_directory: Path) -> tuple[int, ...]:
    """Something that differs whenever the record has grown: cheaper than reading it."""
    found: list[int] = []
    for name in (RECORD, f"{RECORD}-wal"):
        with suppress(OSError):
            status = (run_directory / name).stat()
            found += [status.st_mtime_ns, status.st_size]
    return tuple(found)


def cost_of(record: EvaluationRecord, metric: str, goal: str) -> float:
    """What is minimised: the metric, negated where more is better; NaN where it was not taken."""
    value = record.value(metric)
    return math.nan if value is None else -value if goal == "max" else value


def measured(progress: Progress, metric: str, goal: str, which: Which) -> Measured:
    """The numbers of the evaluation that a trial is ranked by: the last one, or the best of the finite ones."""
    known = [(cost_of(each, metric, goal), each) for each in progress.validation]
    if which == "best":
        known = [pair for pair in known if math.isfinite(pair[0])]
    if not known:
        return Measured()
    cost, chosen = min(known, key=lambda pair: pair[0]) if which == "best" else known[-1]
    sample = next((each for each in progress.training if each.step == chosen.step), None)
    return Measured(
        value=_number(chosen.value(metric)),
        cost=cost,
        validation_loss=chosen.loss,
        training_value=math.nan if sample is None else _number(sample.value(metric)),
        training_loss=math.nan if sample is None else sample.loss,
        epochs=chosen.epoch,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
