"""What a run tells whoever watches it: one line while it trains. `summary` has the page at its end.

On a terminal the line is redrawn in place; elsewhere (a log file, mpirun's pipe) a plain line comes every
few seconds and at each validation. Rank 0 only.
"""

from __future__ import annotations

import io
import math
import sys
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ddp.noise.noise_scale import Reading
from ddp.noise.readings import Metric
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
    headline_metric,
)

REDRAW_SECONDS = 0.2
RATE_STEPS = 50  # steps that the rate is taken over
BAR_WIDTH = 16
METRIC_NAMES: dict[Metric, str] = {"plain": "plain", "preconditioned": "Adam's metric"}
OWN_METRIC_UNKNOWN = ("adagrad", "rmsprop", "adadelta")  # their steps have a metric of their own, and none is measured


def render_line(
    info: RunInfo,
    record: StepRecord,
    evaluation: EvaluationRecord | None,
    examples_per_second: float,
    seconds_left: float,
) -> str:
    """The progress line, for example

    epoch 3.2/8  loss 0.0871  accuracy 97.2 %  6,120 examples/s  noise scale 128 [82, 248]  0:12 left

    Args:
        evaluation: the latest of the validation set, if there was one.
        examples_per_second: NaN where not known yet.
        seconds_left: NaN where not known yet.
    """
    parts = [position_text(info, record), f"loss {record.loss:.4g}"]
    if evaluation is not None:
        parts.append(validation_text(info, evaluation))
    if not math.isnan(examples_per_second):
        parts.append(f"{number_text(examples_per_second)} examples/s")
    if record.noise is not None:
        of_draws = f" ({info.sampling})" if info.sampled else ""
        parts.append(f"noise scale{of_draws} {reading_text(record.noise.reading, headline_metric(record.noise))}")
    if not math.isnan(seconds_left):
        parts.append(f"{duration_text(seconds_left)} left")
    return "  ".join(parts)


def in_epochs(info: RunInfo) -> bool:
    """Whether a run is long enough to be told in epochs; one that sees a part of its data is told in steps.

    One whose end in epochs is open, since its batch adapts itself, is told in the steps that it was given.
    """
    return info.epochs >= 1 or not info.steps


def position_text(info: RunInfo, record: StepRecord) -> str:
    """Where in the run: "epoch 3.2/8", or "step 150/1,500"; without an end, "epoch 3.2", where that is open."""
    if in_epochs(info):
        return f"epoch {record.epoch:.1f}" + (f"/{epochs_text(info.epochs)}" if info.epochs else "")
    return f"step {record.step:,}/{info.steps:,}"


def done_share(info: RunInfo, record: StepRecord) -> float:
    """How much of the run is done, 0 to 1; NaN where its end is not known."""
    if info.steps:
        return record.step / info.steps
    return record.epoch / info.epochs if info.epochs else math.nan


def moment_text(info: RunInfo, step: int, epoch: float) -> str:
    """When in the run: "epoch 3.2", or "step 150"."""
    return f"epoch {epochs_text(epoch)}" if in_epochs(info) else f"step {step:,}"


def epochs_text(epochs: float) -> str:
    """One decimal where it says something: 3.2, 8, 1,200."""
    return f"{epochs:,.1f}".removesuffix(".0")


def reading_text(reading: Reading, metric: Metric = "plain") -> str:
    """A reading with its interval, or its state in words where it has no interval to show.

    The metric is named where it is not the plain one: "128 [82, 248] (Adam's metric)".
    """
    match reading.state:
        case "unresolved":
            return "unresolved"  # in either metric
        case "beyond_data":
            return f"beyond the data (above {number_text(reading.low)}{_named(metric, '; ')})"
        case "lower_bound":
            return f"above {number_text(reading.low)}{_named(metric, ' (', ')')}"
    interval = f"{number_text(reading.noise_scale)} [{number_text(reading.low)}, {number_text(reading.high)}]"
    if reading.state == "wide":
        return f"{interval} (wide{_named(metric, '; ')})"
    return f"{interval}{_named(metric, ' (', ')')}"


def _named(metric: Metric, before: str, after: str = "") -> str:
    return f"{before}{METRIC_NAMES[metric]}{after}" if metric != "plain" else ""


def change_text(info: RunInfo, change: BatchChange) -> str:
    """A change of the batch size, in one line."""
    rate = f", learning rate x {change.learning_rate_factor:.3g}" if change.learning_rate_factor != 1.0 else ""
    moment = moment_text(info, change.step, change.epoch)
    return f"global batch size {change.before:,} -> {change.after:,} at {moment}{rate}: {change.reason}"


def event_text(event: RunEvent) -> str:
    """What happened, in one line."""
    warning = "warning: " if event.kind == "warning" else ""
    return f"step {event.step:,}: {warning}{event.text}"


def number_text(value: float) -> str:
    """Two digits below ten, whole numbers above: 2.1, 54, 1,472."""
    if not math.isfinite(value):
        return "?" if math.isnan(value) else "infinity"
    return f"{value:.2g}" if abs(value) < 9.95 else f"{value:,.0f}"


def metric_text(name: str, value: float) -> str:
    """Accuracies in percent, other metrics as they are."""
    return f"{name} {100 * value:.1f} %" if "accuracy" in name else f"{name} {value:.4g}"


def validation_text(info: RunInfo, evaluation: EvaluationRecord) -> str:
    """The watched metric, or the loss, named so that it is not taken for the training loss."""
    value = evaluation.value(info.metric)
    if value is None or info.metric == "loss":
        return f"validation loss {evaluation.loss:.4g}"
    return metric_text(info.metric, value)


def duration_text(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Rate:
    """Examples a second over the latest steps, and the time left at the pace of this process so far."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._latest: deque[StepRecord] = deque(maxlen=RATE_STEPS)
        self._first: StepRecord | None = None

    def observe(self, record: StepRecord) -> None:
        self._first = self._first or record  # its own time is not counted: it holds what compiles and warms up
        self._latest.append(record)

    def examples_per_second(self) -> float:
        seconds = sum(record.duration_seconds for record in self._latest)
        return sum(record.examples for record in self._latest) / seconds if seconds > 0 else math.nan

    def seconds_left(self) -> float:
        """Evaluations in between are paid for: this goes by the clock and not by the steps' own time."""
        if self._first is None:
            return math.nan
        last = self._latest[-1]
        share = done_share(self._info, last)
        done = share - done_share(self._info, self._first)
        if not done > 0:
            return math.nan
        return (last.unix_time - self._first.unix_time) * (1.0 - share) / done


class Progress(Sink):
    """A `Sink` that shows the run's line on `stream`. A stream that has gone away ends the showing, not the run."""

    def __init__(self, info: RunInfo, stream: TextIO | None = None, *, interval_seconds: float = 5.0) -> None:
        """
        Args:
            stream: standard error where left out, so that standard output stays for results.
            interval_seconds: between two lines where `stream` is not a terminal.
        """
        self._info = info
        stream = stream or sys.stderr  # None where the process was started without one
        self._console = Console(file=stream or io.StringIO(), highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._interval_seconds = REDRAW_SECONDS if self._live else interval_seconds
        self._rate = Rate(info)
        self._record: StepRecord | None = None
        self._evaluation: EvaluationRecord | None = None
        self._shown_unix_time = -math.inf
        self._usable = stream is not None
        if self._live is not None:
            self._attempt(self._live.start)

    def step(self, record: StepRecord) -> None:
        self._record = record
        self._rate.observe(record)
        if record.unix_time - self._shown_unix_time >= self._interval_seconds:
            self._show(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        if record.split != "validation":
            return
        self._evaluation = record
        if self._record is not None:
            self._show(self._record)

    def event(self, record: RunEvent) -> None:
        """One line, but for saves that went well: those come again and again."""
        if record.kind == "rolled_back" and self._evaluation is not None and self._evaluation.step > record.step:
            self._evaluation = None
        if record.kind != "saved":
            self._attempt(lambda: self._put_line(event_text(record)))

    def batch_change(self, record: BatchChange) -> None:
        self._attempt(lambda: self._put_line(change_text(self._info, record)))

    def close(self) -> None:
        """Show the last state and leave the terminal as it was. Safe to call twice."""
        if self._live is not None and self._record is not None:
            self._show(self._record)
        if self._live is not None:
            self._attempt(self._live.stop)
        self._usable = False

    def _attempt(self, show: Callable[[], object]) -> None:
        """Show something unless the stream has gone away."""
        if not self._usable:
            return
        try:
            show()
        except (OSError, ValueError):  # a closed pipe or file
            self._usable = False

    def _show(self, record: StepRecord) -> None:
        self._shown_unix_time = record.unix_time
        rate, left = self._rate.examples_per_second(), self._rate.seconds_left()
        self._attempt(lambda: self._put(record, render_line(self._info, record, self._evaluation, rate, left)))

    def _put(self, record: StepRecord, line: str) -> None:
        if self._live is not None:
            self._live.update(self._with_bar(record, line), refresh=True)
        else:
            self._put_line(line)

    def _put_line(self, line: str) -> None:
        """One that stays: above the live one, or as it is where rich would end the process for a closed pipe."""
        if self._live is not None:
            self._console.print(Text(line), soft_wrap=True)
        else:
            self._console.file.write(line + "\n")
            self._console.file.flush()

    def _with_bar(self, record: StepRecord, line: str) -> Table:
        """The line after a bar where there is room for both; a narrow terminal wraps it, nothing is cut."""
        grid = Table.grid(padding=(0, 1))
        if len(line) + BAR_WIDTH + 1 > self._console.width:
            grid.add_row(Text(line))
            return grid
        grid.add_column(width=BAR_WIDTH)
        grid.add_row(ProgressBar(total=1.0, completed=done_share(self._info, record), width=BAR_WIDTH), Text(line))
        return grid
