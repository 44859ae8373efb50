"""What is worth keeping of a run for its end, and the page of text that says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp.noise.noise_scale import Reading
from ddp.telemetry.progress import epochs_text, in_epochs, metric_text, moment_text, number_text, reading_text
from ddp.telemetry.records import EvaluationRecord, RunInfo, StepRecord

KEPT_READINGS = 512
SHOWN_READINGS = 6
SPARKLINE_LENGTH = 32
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class TimedReading:
    """A reading and when it was taken."""

    step: int
    epoch: float
    reading: Reading


class History:
    """A `Sink` that keeps what `summary` needs, in bounded memory."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self.last: StepRecord | None = None
        self.validation: EvaluationRecord | None = None
        self.readings: list[TimedReading] = []  # evenly spaced, at most KEPT_READINGS
        self.first_resolved: TimedReading | None = None
        self.target_reached: EvaluationRecord | None = None
        self.at_target: TimedReading | None = None  # None also where the noise scale is off
        self._latest: TimedReading | None = None
        self._stride = 1

    @property
    def latest(self) -> TimedReading | None:
        """The latest reading, None before the first or where the noise scale is off."""
        return self._latest

    def step(self, record: StepRecord) -> None:
        self.last = record
        if record.reading is None:
            return
        self._latest = timed = TimedReading(record.step, record.epoch, record.reading)
        if self.first_resolved is None and record.reading.state == "resolved":
            self.first_resolved = timed
        if record.step % self._stride == 0:
            self.readings.append(timed)
        if len(self.readings) > KEPT_READINGS:
            self._stride *= 2
            self.readings = [kept for kept in self.readings if kept.step % self._stride == 0]

    def evaluation(self, record: EvaluationRecord) -> None:
        if record.split != "validation":
            return
        self.validation = record
        if self.target_reached is None and self._info.target_reached_by(record.value(self._info.metric)):
            self.target_reached, self.at_target = record, self._latest

    def close(self) -> None:
        """Nothing to release."""


def summary(
    info: RunInfo,
    history: History,
    *,
    advice: str | None = None,
    report_path: Path | None = None,
    metrics_address: str | None = None,
) -> str:
    """The text at the end of a run, without a newline at its end.

    Args:
        advice: one sentence from the first resolved reading, or the state in words.
        metrics_address: host:port that metrics were served on.
    """
    rows = [("run", _run_text(info, history)), *_validation_rows(info, history), *_noise_rows(info, history)]
    rows += [("advice", advice)] if advice else []
    rows += [("report", str(report_path))] if report_path else []
    rows += [("metrics", f"http://{metrics_address}/metrics")] if metrics_address else []
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
    noise = f", noise scale {reading_text(history.at_target.reading)}" if history.at_target else ""
    return [*rows, ("target", f"{goal} reached at {moment_text(info, history.target_reached.step)}{noise}")]


def _noise_rows(info: RunInfo, history: History) -> list[tuple[str, str]]:
    """The noise scale at the end, the global batch size beside it, and the path it took."""
    batch = ("global batch", f"{info.global_batch_size:,} examples")
    if history.latest is None:
        return [("noise scale", "not measured"), batch]
    end = history.latest.reading
    named = f" examples, {end.state}" if end.state in ("resolved", "wide") else ""
    rows = [("noise scale", f"{reading_text(end).removesuffix(' (wide)')}{named} at the end"), batch]
    measured = [timed for timed in history.readings if timed.reading.state != "unresolved"]
    path = [
        f"{moment_text(info, timed.step)}: {reading_text(timed.reading)}" for timed in _spread(measured, SHOWN_READINGS)
    ]
    bars = sparkline([_point(timed.reading) for timed in _spread(measured, SPARKLINE_LENGTH)])
    path = [bars, *path] if bars else path
    return rows + [("" if i else "its path", line) for i, line in enumerate(path)]


def _point(reading: Reading) -> float:
    """The estimate where there is one to believe."""
    return reading.noise_scale if reading.state in ("resolved", "wide") else math.nan


def sparkline(values: Sequence[float]) -> str:
    """Finite positive values as bars on a log scale with both ends named; gaps stay gaps."""
    known = [math.log(value) for value in values if math.isfinite(value) and value > 0]
    if len(known) < 2:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    bars = "".join(
        BARS[round((math.log(value) - low) / span * (len(BARS) - 1))] if math.isfinite(value) and value > 0 else " "
        for value in values
    ).rstrip()
    return f"{number_text(math.exp(low))} {bars} {number_text(math.exp(max(known)))}"


def _spread(readings: Sequence[TimedReading], count: int) -> Sequence[TimedReading]:
    """At most `count` of `readings`, evenly spread, both ends included."""
    if len(readings) <= count:
        return readings
    return [readings[round(i * (len(readings) - 1) / (count - 1))] for i in range(count)]
