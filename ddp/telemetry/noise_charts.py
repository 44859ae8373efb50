"""The report's figures of the noise scale: both metrics over the run, and each layer over the run.

`charts` has the style they share with the other figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddp.noise.noise_scale import Reading, State
from ddp.noise.readings import Metric
from ddp.telemetry.charts import (
    DASHED,
    PALETTE,
    SIZE_INCHES,
    Drawing,
    Key,
    Steps,
    finished_drawing,
    log_axis,
    new_figure,
)
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.progress import METRIC_NAMES, number_text
from ddp.telemetry.records import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CRITICAL_COLOURS = ("orange", "green", "violet")  # more lines would only hide each other


@dataclass(frozen=True)
class Series:
    """One metric's readings over the steps that have one: floats of shape (readings,), NaN where there is none."""

    metric: Metric
    epochs: NDArray[np.float64]
    point: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    states: tuple[State, ...]

    def within(self, *states: State) -> NDArray[np.bool_]:
        """Where the state is one of these."""
        return np.array([state in states for state in self.states], dtype=bool)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Where there is an interval to show."""
        return self.within("resolved", "wide")

    @property
    def bounded(self) -> NDArray[np.bool_]:
        """Where only a lower bound is known."""
        return self.within("lower_bound", "beyond_data")

    @property
    def limits(self) -> NDArray[np.float64]:
        """All numbers that the axis should hold."""
        return np.where(self.within("unresolved"), np.nan, [self.point, self.low, self.high])


def series(steps: Steps, metric: Metric) -> Series:
    """The readings in `metric` of all steps that have one."""
    readings = {record.epoch: reading for record in steps if (reading := _reading(record, metric)) is not None}
    ends = ([getattr(reading, name) for reading in readings.values()] for name in ("noise_scale", "low", "high"))
    point, low, high = (np.array(end, dtype=float) for end in ends)
    states: tuple[State, ...] = tuple(reading.state for reading in readings.values())
    return Series(metric, np.array(list(readings), dtype=float), point, low, high, states)


def _reading(record: StepRecord, metric: Metric) -> Reading | None:
    if record.noise is None:
        return None
    return record.noise.plain if metric == "plain" else record.noise.preconditioned


def noise_chart(
    steps: Steps,
    headline: Metric,
    training_examples: int,
    critical_batches: Sequence[CriticalBatch] = (),
    size_inches: tuple[float, float] = SIZE_INCHES,
) -> Drawing:
    """The noise scale with its interval on a log scale, where there is one, beside the global batch size.

    The headline metric is blue, the other one teal and thin. Where only a lower bound is known (beyond the data too)
    that bound is dotted and all above it shaded; a wide interval is paler; stretches in which the headline is
    unresolved show nothing but a grey bar at the foot.
    """
    figure, axes = new_figure(size_inches)
    other: Metric = "plain" if headline == "preconditioned" else "preconditioned"
    main, beside = series(steps, headline), series(steps, other)
    levels = [float(record.global_batch_size) for record in steps if record.noise is not None]
    measured = [each for each in critical_batches if np.isfinite(each.critical_batch_size)][: len(CRITICAL_COLOURS)]
    values = np.concatenate([main.limits.ravel(), beside.limits.ravel()])
    shown = [*levels, *(each.critical_batch_size for each in measured)]
    bottom, top = _limits(values, shown, training_examples)
    axes.set_ylim(bottom, top)
    keys = _draw_other(axes, beside) if beside.known.any() or beside.bounded.any() else []
    keys = [*_draw_headline(axes, main, bottom, top, named=bool(keys)), *keys, *_draw_batch(axes, steps, levels)]
    keys += _draw_critical(axes, measured)
    if training_examples:  # 0: a stream that does not say how long it is
        axes.axhline(training_examples, color=PALETTE["muted"], linewidth=1, linestyle=":")
    if bottom < training_examples < top:
        keys.append(Key(f"training set {training_examples:,}", "muted", "dotted"))
    log_axis(axes)
    return finished_drawing(figure, axes, "gradient noise scale over epochs", keys)


def _draw_headline(axes: Axes, main: Series, bottom: float, top: float, *, named: bool) -> list[Key]:
    """Line, interval, lower bounds and the grey foot; `named` says the metric, where there is another one."""
    resolved, unresolved = main.within("resolved"), main.within("unresolved")
    _shade(axes, main.epochs, main.low, main.high, main.known, "blue", 0.12)
    _shade(axes, main.epochs, main.low, main.high, resolved, "blue", 0.14)
    _shade(axes, main.epochs, main.low, np.full_like(main.low, top), main.bounded, "blue", 0.06)
    axes.plot(main.epochs, _only(main.point, main.known), color=PALETTE["blue"])
    axes.plot(main.epochs, _only(main.low, main.bounded), color=PALETTE["blue"], linestyle=":")
    foot = np.full(len(main.epochs), bottom)
    axes.plot(main.epochs, _only(foot, unresolved), color=PALETTE["muted"], linewidth=7)
    label = f"noise scale, {METRIC_NAMES[main.metric]}" if named else "noise scale"
    keys = [
        Key(label, "blue") if main.known.any() else None,
        Key("95 % interval", "blue", "band") if main.known.any() else None,
        Key("lower bound only", "blue", "dotted") if main.bounded.any() else None,
        Key("unresolved", "muted", "bar") if unresolved.any() else None,
    ]
    return [key for key in keys if key]


def _draw_other(axes: Axes, beside: Series) -> list[Key]:
    """The metric that does not fit the optimizer: thin, with a pale interval."""
    _shade(axes, beside.epochs, beside.low, beside.high, beside.known, "teal", 0.10)
    axes.plot(beside.epochs, _only(beside.point, beside.known), color=PALETTE["teal"], linewidth=1.1)
    axes.plot(beside.epochs, _only(beside.low, beside.bounded), color=PALETTE["teal"], linewidth=1.1, linestyle=":")
    return [Key(f"noise scale, {METRIC_NAMES[beside.metric]}", "teal")]


def _draw_batch(axes: Axes, steps: Steps, levels: Sequence[float]) -> list[Key]:
    """A level where the global batch size stays, stairs where it adapts itself."""
    low, high = min(levels), max(levels)
    if low == high:
        axes.axhline(low, color=PALETTE["red"], **DASHED)
        return [Key(f"global batch size {low:,.0f}", "red", "dashed")]
    epochs = [record.epoch for record in steps if record.noise is not None]
    axes.plot(epochs, levels, color=PALETTE["red"], drawstyle="steps-pre", **DASHED)
    return [Key(f"global batch size, {low:,.0f} to {high:,.0f}", "red", "dashed")]


def _draw_critical(axes: Axes, measured: Sequence[CriticalBatch]) -> list[Key]:
    """Levels that runs have measured, under their own name."""
    keys: list[Key] = []
    for each, colour in zip(measured, CRITICAL_COLOURS, strict=False):
        axes.axhline(each.critical_batch_size, color=PALETTE[colour], linewidth=1.1)
        size = number_text(each.critical_batch_size)
        keys.append(Key(f"critical batch size {size} ({each.method}, {each.optimizer}, {each.target})", colour))
    return keys


def _only(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(where, values, np.nan)


def _limits(values: NDArray[np.float64], levels: Sequence[float], training_examples: int) -> tuple[float, float]:
    """Ends of a log axis that holds the levels and the middle 98 % of the values.

    A few wild ends do not set it, nor does what lies far beyond the training set, where a reading means little.
    """
    known = values[np.isfinite(values) & (values > 0)]
    low, high = (float(end) for end in np.percentile(known, (1, 99))) if len(known) else (1.0, 1.0)
    high = min(high, 20.0 * max(training_examples, *levels))
    return max(0.1, min(low, *levels) / 2), max(high, *levels) * 2


def _shade(
    axes: Axes,
    epochs: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    where: NDArray[np.bool_],
    colour: str,
    alpha: float,
) -> None:
    """Between `low` and `high`, up to the step after each stretch, so that a single step shows too."""
    if where.any():
        where = where | np.concatenate([[False], where[:-1]])
        axes.fill_between(epochs, low, high, where=where.tolist(), color=PALETTE[colour], alpha=alpha, linewidth=0)
