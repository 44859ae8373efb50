"""What is worth keeping of a run for its end, and the page of text that says it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ddp.noise.advice import stands
from ddp.noise.noise_scale import Reading
from ddp.noise.readings import Method, Metric, NoiseReadings
from ddp.telemetry.progress import (
    METRIC_NAMES,
    OWN_METRIC_UNKNOWN,
    epochs_text,
    in_epochs,
    metric_text,
    moment_text,
    reading_text,
)
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
    headline_metric,
)
from ddp.telemetry.sparkline import sparkline
from ddp.telemetry.warning_text import warning_rows

KEPT_READINGS = 512
KEPT_VALIDATIONS = 64  # one of them is the latest again after a roll-back
KEPT_EVENTS = 1_000
SHOWN_READINGS = 6
SHOWN_CHANGES = 6
SPARKLINE_LENGTH = 32


@dataclass(frozen=True, slots=True)
class TimedReading:
    """A headline reading, in which metric and when it was taken, and the global batch size of that step."""

    step: int
    epoch: float
    reading: Reading
    metric: Metric
    method: Method
    global_batch_size: int
    moved_step: int  # the latest step that observed it
    moved_epoch: float


Kept = TypeVar("Kept", StepRecord, EvaluationRecord, TimedReading)


class History(Sink):
    """A `Sink` that keeps what `summary` needs, in bounded memory."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self.last: StepRecord | None = None
        self._validations: deque[EvaluationRecord] = deque(maxlen=KEPT_VALIDATIONS)
        self.events: deque[RunEvent] = deque(maxlen=KEPT_EVENTS)  # the latest ones, but for saves that went well
        self.readings: list[TimedReading] = []  # evenly spaced, at most KEPT_READINGS
        self.latest_resolved: TimedReading | None = None
        self.target_reached: EvaluationRecord | None = None
        self.at_target: TimedReading | None = None  # None also where the noise scale is off
        self.changes: list[BatchChange] = []
        self._latest: TimedReading | None = None
        self._stride = 1

    @property
    def validation(self) -> EvaluationRecord | None:
        """The latest one."""
        return self._validations[-1] if self._validations else None

    @property
    def latest(self) -> TimedReading | None:
        """The latest reading, None before the first or where the noise scale is off."""
        return self._latest

    @property
    def advised(self) -> TimedReading | None:
        """The reading that advice comes from: the latest resolved one while it stands, else the latest of all."""
        latest, resolved = self._latest, self.latest_resolved
        if latest is None or resolved is None:
            return latest
        same_metric = latest.metric == resolved.metric
        return resolved if stands(resolved.reading, latest.reading, same_metric=same_metric) else latest

    @property
    def global_batch_size(self) -> int:
        """The latest step's; what the run starts with before the first."""
        if self.last is not None:
            return self.last.global_batch_size
        return self.changes[-1].after if self.changes else self._info.global_batch_size

    def step(self, record: StepRecord) -> None:
        self.last = record
        if record.noise is None:
            return
        before, self._latest = self._latest, self._timed(record, record.noise)
        timed = self._latest
        if timed.reading.state == "resolved" and (before is None or timed.reading is not before.reading):
            self.latest_resolved = timed
        if record.step % self._stride == 0:
            self.readings.append(timed)
        if len(self.readings) > KEPT_READINGS:
            self._stride *= 2
            self.readings = [kept for kept in self.readings if kept.step % self._stride == 0]

    def event(self, record: RunEvent) -> None:
        if record.kind != "saved":
            self.events.append(record)
        if record.kind == "rolled_back":
            self._forget_after(record.step)

    def _forget_after(self, step: int) -> None:
        """What was told of later steps is void: the run takes them again."""
        self.readings = [timed for timed in self.readings if timed.step <= step]
        resolved = [timed for timed in self.readings if timed.reading.state == "resolved"]
        self.latest_resolved = _until(step, self.latest_resolved) or (resolved[-1] if resolved else None)
        self._latest = _until(step, self._latest) or (self.readings[-1] if self.readings else None)
        self.last = _until(step, self.last)
        self.changes = [change for change in self.changes if change.step <= step]
        kept = [record for record in self._validations if record.step <= step]
        self._validations = deque(kept, maxlen=KEPT_VALIDATIONS)
        if _until(step, self.target_reached) is None:
            self.target_reached = self.at_target = None

    def batch_change(self, record: BatchChange) -> None:
        self.changes.append(record)

    def _timed(self, record: StepRecord, noise: NoiseReadings) -> TimedReading:
        """A step that did not move the reading leaves the method by which it was observed, and when."""
        before, metric = self._latest, headline_metric(noise)
        method, moved_step, moved_epoch = noise.method, record.step, record.epoch
        if before is not None and noise.reading is before.reading:
            method, moved_step, moved_epoch = before.method, before.moved_step, before.moved_epoch
        return TimedReading(
            *(record.step, record.epoch, noise.reading, metric, method, record.global_batch_size),
            *(moved_step, moved_epoch),
        )

    def evaluation(self, record: EvaluationRecord) -> None:
        if record.split != "validation":
            return
        self._validations.append(record)
        if self.target_reached is None and self._info.target_reached_by(record.value(self._info.metric)):
            self.target_reached, self.at_target = record, self._latest


def _until(step: int, record: Kept | None) -> Kept | None:
    return None if record is None or record.step > step else record


def summary(
    info: RunInfo,
    history: History,
    *,
    advice: str | None = None,
    goodput: str | None = None,
    report_path: Path | None = None,
    metrics_url: str | None = None,
) -> str:
    """The text at the end of a run, without a newline at its end.

    Args:
        advice: one sentence from `History.advised`.
        goodput: how much of the run's time counted, where that is worth a line.
        metrics_url: where metrics were served.
    """
    rows = [("run", _run_text(info, history)), *_validation_rows(info, history), *_noise_rows(info, history)]
    rows += [("advice", advice)] if advice else []
    rows += warning_rows(history.events)
    rows += [("goodput", goodput)] if goodput else []
    rows += [("report", str(report_path))] if report_path else []
    rows += [("metrics", metrics_url)] if metrics_url else []
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def _run_text(info: RunInfo, history: History) -> str:
    if history.last is None:
        return f"{info.run_id}: no steps"
    epochs = f", {epochs_text(history.last.epoch)} epochs" if in_epochs(info) else ""
    ranks = f"{info.world_size} rank{'s' if info.world_size > 1 else ''}"
    return f"{info.run_id}: {history.last.step:,} steps{epochs}, {ranks}"


def _validation_rows(info: RunInfo, history: History) -> list[tuple[str, str]]:
    """The validation metric at the end, and the noise scale when the target was reached."""
    record = history.validation
    if record is None:
        return []
    value = record.metrics.get(info.metric)
    shown = "" if value is None else f"{metric_text(info.metric, value)}, "
    rows = [("validation", f"{shown}loss {record.loss:.4g} on {record.examples:,} examples")]
    if info.target is None:
        return rows
    goal = metric_text(info.metric, info.target)
    if history.target_reached is None:
        return [*rows, ("target", f"{goal} was not reached")]
    then, reached = history.at_target, history.target_reached
    noise = f", noise scale {reading_text(then.reading, then.metric)}" if then else ""
    return [*rows, ("target", f"{goal} reached at {moment_text(info, reached.step, reached.epoch)}{noise}")]


def _noise_rows(info: RunInfo, history: History) -> list[tuple[str, str]]:
    """The noise scale at the end, the global batch size beside it, and the path it took."""
    batch = ("global batch", _batch_text(info, history))
    if history.latest is None:
        return [("noise scale", "not measured"), batch]
    of_draws = f", of {info.sampled}," if info.sampled else ""
    plain = f" in the plain metric, not {info.optimizer}'s own," if info.optimizer in OWN_METRIC_UNKNOWN else ""
    at_the_end = f"{_reading_in_full(history.latest)}{of_draws}{plain} {as_of_text(info, history.latest)}"
    rows = [("noise scale", at_the_end), batch]
    measured = [timed for timed in history.readings if timed.reading.state != "unresolved"]
    shown = _spread(measured, SHOWN_READINGS)
    path = [
        f"{moment_text(info, timed.step, timed.epoch)}: {reading_text(timed.reading, _unless_all(timed, shown))}"
        for timed in shown
    ]
    bars = sparkline([_point(timed.reading) for timed in _spread(measured, SPARKLINE_LENGTH)])
    path = [bars, *path] if bars else path
    return rows + [("" if i else "its path", line) for i, line in enumerate(path)]


def as_of_text(info: RunInfo, timed: TimedReading) -> str:
    """Either "at the end", or since when the reading has stood where later steps did not observe it."""
    if not timed.reading.observations:
        return "because nothing was measured"
    moved = moment_text(info, timed.moved_step, timed.moved_epoch)
    return "at the end" if moved == moment_text(info, timed.step, timed.epoch) else f"as of {moved}"


def _reading_in_full(timed: TimedReading) -> str:
    """With its state and metric: "54 [40, 75] examples, resolved, in Adam's metric"."""
    end, metric = timed.reading, timed.metric
    if end.state not in ("resolved", "wide"):
        return reading_text(end, metric)
    named = f", in {METRIC_NAMES[metric]}" if metric != "plain" else ""
    return f"{reading_text(end).removesuffix(' (wide)')} examples, {end.state}{named}"


def _unless_all(timed: TimedReading, shown: Sequence[TimedReading]) -> Metric:
    """The metric to name on a line of the path: none where all are in the one named above."""
    return timed.metric if len({each.metric for each in shown}) > 1 else "plain"


def _batch_text(info: RunInfo, history: History) -> str:
    """The size, or the way it went where it adapted itself."""
    changes = history.changes
    if not changes:
        return f"{history.global_batch_size:,} examples"
    sizes = [f"{changes[0].before:,} examples"]
    sizes += [f"{each.after:,} from {moment_text(info, each.step, each.epoch)}" for each in changes[-SHOWN_CHANGES:]]
    if len(changes) > SHOWN_CHANGES:
        sizes.insert(1, "...")
    return " -> ".join(sizes)


def _point(reading: Reading) -> float:
    """The estimate where there is one to believe."""
    return reading.noise_scale if reading.state in ("resolved", "wide") else math.nan


def _spread(readings: Sequence[TimedReading], count: int) -> Sequence[TimedReading]:
    """At most `count` of `readings`, evenly spread, both ends included."""
    if len(readings) <= count:
        return readings
    return [readings[round(i * (len(readings) - 1) / (count - 1))] for i in range(count)]
