"""The figures of a critical-batch search: findings in, one inline SVG a figure out. Needs matplotlib.

One colour a target. Everything that depends on the batch size lies over the same logarithmic axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddp.noise.estimate import Estimate
from ddp.noise.hyperbola import log_curve
from ddp.search.findings import BatchRow, Finding
from ddp.telemetry.charts import PALETTE, SIZE_INCHES, Drawing, Key, finished_drawing, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("blue", "orange", "green", "violet", "red", "teal")
BATCH_LABEL = "batch size, examples"
POINTS: dict[str, Any] = {"fmt": "o", "markersize": 3.6, "elinewidth": 1.1, "capsize": 0}
Array = NDArray[np.float64]


def steps_chart(found: Sequence[Finding], size_inches: tuple[float, float] = SIZE_INCHES) -> Drawing:
    """Steps to each target with the fit, the measured critical batch size, and what the noise scale predicted.

    The two predictions are of the last target alone, where runs were longest.
    """
    figure, axes = new_figure(size_inches)
    keys: list[Key] = []
    for each, colour in zip(found, _colours(found), strict=True):
        _points(axes, each, colour, lambda row: row.best.steps)
        _fitted(axes, each, colour, lambda size, steps: steps)
        if value := each.fit.critical_batch_size:
            axes.axvspan(value.low, value.high, color=PALETTE[colour], alpha=0.12, linewidth=0)
            axes.axvline(value.value, color=PALETTE[colour], linewidth=1)
        keys.append(Key(f"loss {each.target:g}", colour))
    keys += _predictions(axes, found[-1])
    if any(each.fit.critical_batch_size for each in found):
        keys.append(Key("critical batch size, 95 % interval", COLOURS[0], "band"))
    return _over_batch_size(figure, axes, found, "steps to the target against batch size", keys)


def examples_chart(found: Sequence[Finding]) -> Drawing:
    figure, axes = new_figure()
    for each, colour in zip(found, _colours(found), strict=True):
        _points(axes, each, colour, lambda row: row.examples)
        _fitted(axes, each, colour, lambda size, steps: size * steps)
    return _over_batch_size(figure, axes, found, "examples to the target against batch size", _keys(found))


def predictions_chart(found: Sequence[Finding]) -> Drawing:
    """Measured and predicted side by side, one line a target."""
    figure, axes = new_figure((SIZE_INCHES[0], 0.9 + 0.55 * len(found)))
    for place, each in enumerate(found):
        _interval(axes, each.fit.critical_batch_size, place, "blue", "o")
        _interval(axes, each.predicted_plain, place + 0.2, "teal", "D")
        _interval(axes, each.predicted_preconditioned, place + 0.4, "sand", "s")
        if each.harmless is not None and each.harmless.batch_size is not None:
            axes.plot([each.harmless.batch_size], [place - 0.2], "^", color=PALETTE["green"], markersize=5)
    axes.set_yticks(range(len(found)), [f"loss {each.target:g}" for each in found])
    axes.set_ylim(len(found) - 0.3, -0.6)
    axes.grid(visible=False, axis="y")
    keys = [
        Key("critical batch size, measured", "blue"),
        Key("noise scale, plain", "teal"),
        Key("noise scale, preconditioned", "sand") if any(each.predicted_preconditioned for each in found) else None,
        Key("largest batch that does no harm", "green", "bar"),
    ]
    _batch_axis(axes, _sizes(found))
    label = "critical batch size and predictions by target"
    return finished_drawing(figure, axes, label, [key for key in keys if key], x_label="examples")


def trade_off_chart(found: Sequence[Finding]) -> Drawing:
    """Steps against examples, a point a batch size: what time and cost would be if every step took as long."""
    figure, axes = new_figure()
    for each, colour in zip(found, _colours(found), strict=True):
        examples, steps = ([value(row).value for row in each.rows] for value in (_examples, _steps))
        axes.plot(examples, steps, "o", color=PALETTE[colour], markersize=3.6)
        if curve := _curve(each):
            sizes, fitted = curve
            axes.plot(sizes * fitted, fitted, color=PALETTE[colour])
    _name_points(axes, found[-1].rows, _examples, _steps)
    axes.set_xscale("log")
    _plain_x_axis(axes)
    log_axis(axes)
    return finished_drawing(figure, axes, "steps against examples", _keys(found), x_label="examples to the target")


def time_chart(found: Sequence[Finding]) -> Drawing:
    """Time to the target in one process against examples, and the batch sizes that no other beats in both."""
    figure, axes = new_figure()
    for each, colour in zip(found, _colours(found), strict=True):
        examples, seconds = np.array([(row.examples.value, row.seconds) for row in each.rows]).reshape(-1, 2).T
        axes.plot(examples, seconds, "o", color=PALETTE[colour], markersize=3.6, alpha=0.45)
        front = pareto_front(examples, seconds)
        axes.plot(examples[front], seconds[front], "o-", color=PALETTE[colour], markersize=3.6)
    _name_points(axes, found[-1].rows, _examples, lambda row: Estimate(row.seconds, row.seconds, row.seconds))
    axes.set_xscale("log")
    _plain_x_axis(axes)
    log_axis(axes)
    return finished_drawing(figure, axes, "seconds against examples", _keys(found), x_label="examples to the target")


def learning_rate_chart(found: Sequence[Finding]) -> Drawing:
    """Best learning rates, with guides of slope 1/2 and 1 through the smallest batch's; open where on the edge."""
    figure, axes = new_figure()
    for each, colour in zip(found, _colours(found), strict=True):
        sizes = [row.batch_size for row in each.rows]
        axes.plot(sizes, [row.best.learning_rate for row in each.rows], color=PALETTE[colour])
        for inside, face in ((True, PALETTE[colour]), (False, "none")):
            rows = [row for row in each.rows if row.best.interior == inside]
            points = [row.batch_size for row in rows], [row.best.learning_rate for row in rows]
            axes.plot(*points, "o", color=PALETTE[colour], markerfacecolor=face, markersize=4)
    keys = _keys(found)
    axes.set_yscale("log")
    rates = [row.best.learning_rate for each in found for row in each.rows]
    axes.set_ylim(min(rates) / 2, max(rates) * 2)  # the guides go where they go
    if found[-1].rows:
        first, sizes = found[-1].rows[0], np.array(_sizes(found), dtype=np.float64)
        for power, line, name in ((0.5, ":", "square root"), (1.0, "--", "linear")):
            guide = first.best.learning_rate * (sizes / first.batch_size) ** power
            axes.plot(sizes, guide, line, color=PALETTE["muted"], linewidth=1)
            keys.append(Key(name, "muted", "dotted" if power < 1 else "dashed"))
    return _over_batch_size(figure, axes, found, "best learning rate against batch size", keys)


def validation_chart(found: Sequence[Finding], name: str, value: Callable[[BatchRow], Estimate]) -> Drawing:
    """Generalisation: a validation value when the training loss reaches each target."""
    figure, axes = new_figure()
    for each, colour in zip(found, _colours(found), strict=True):
        _points(axes, each, colour, value, joined=True)
    return _over_batch_size(figure, axes, found, f"{name} at the target", _keys(found), log=False)


def step_chart(found: Sequence[Finding]) -> Drawing:
    """Time of a step and memory, of the last target's runs (one chart, two panels of a row)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = found[-1].rows
    sizes = [row.batch_size for row in rows]
    left.plot(sizes, [1000 * row.seconds_per_step for row in rows], "o-", color=PALETTE["blue"], markersize=3.6)
    right.plot(sizes, [row.peak_memory_bytes / 2**20 for row in rows], "o-", color=PALETTE["violet"], markersize=3.6)
    log_axis(left)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        _batch_axis(axes, sizes, most=5)
    left.set_xlabel(BATCH_LABEL)
    keys = [Key("milliseconds a step", "blue"), Key("MiB at most", "violet")]
    return finished_drawing(figure, right, "time of a step and memory against batch size", keys, x_label=BATCH_LABEL)


def pareto_front(cost: Array, time: Array) -> NDArray[np.intp]:
    """Indices of the points that none beats in both, by rising cost."""
    order = np.lexsort((time, cost))
    best = np.minimum.accumulate(time[order])
    return order[np.concatenate([[True], time[order][1:] < best[:-1]])] if len(order) else order


# --- parts of a figure ----------------------------------------------------------------------------------------------


def _steps(row: BatchRow) -> Estimate:
    return row.best.steps


def _examples(row: BatchRow) -> Estimate:
    return row.examples


def _colours(found: Sequence[Finding]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(found))]


def _keys(found: Sequence[Finding]) -> list[Key]:
    return [Key(f"loss {each.target:g}", colour) for each, colour in zip(found, _colours(found), strict=True)]


def _sizes(found: Sequence[Finding]) -> list[int]:
    return sorted({row.batch_size for each in found for row in each.rows})


def _points(
    axes: Axes, found: Finding, colour: str, value: Callable[[BatchRow], Estimate], *, joined: bool = False
) -> None:
    """Values with their intervals, where these are finite."""
    rows = [row for row in found.rows if math.isfinite(value(row).value)]
    sizes, values = [row.batch_size for row in rows], [value(row) for row in rows]
    bars = np.array([(each.value - each.low, each.high - each.value) for each in values]).reshape(-1, 2).T
    shown = [each.value for each in values]
    axes.errorbar(sizes, shown, np.where(np.isfinite(bars), bars, 0), color=PALETTE[colour], **POINTS)
    if joined:
        axes.plot(sizes, shown, color=PALETTE[colour], linewidth=1, alpha=0.6)


def _curve(found: Finding) -> tuple[Array, Array] | None:
    """Batch sizes and fitted steps; None where there is no fit to show."""
    steps, critical = found.fit.smallest_steps, found.fit.critical_batch_size
    if steps is None or critical is None:
        return None
    sizes = np.geomspace(found.rows[0].batch_size, found.rows[-1].batch_size, 80)
    return sizes, np.exp(log_curve(np.log(sizes), math.log(steps.value), math.log(critical.value)))


def _fitted(axes: Axes, found: Finding, colour: str, value: Callable[[Array, Array], Array]) -> None:
    if curve := _curve(found):
        sizes, steps = curve
        axes.plot(sizes, value(sizes, steps), color=PALETTE[colour])


def _predictions(axes: Axes, found: Finding) -> list[Key]:
    keys: list[Key] = []
    for name, colour, predicted in (
        ("plain", "teal", found.predicted_plain),
        ("preconditioned", "sand", found.predicted_preconditioned),
    ):
        if predicted is not None:
            axes.axvline(predicted.value, color=PALETTE[colour], linewidth=1.3, linestyle=(0, (5, 3)))
            keys.append(Key(f"{name} noise scale predicts {predicted.value:,.0f}", colour, "dashed"))
    return keys


def _interval(axes: Axes, estimate: Estimate | None, place: float, colour: str, marker: str) -> None:
    if estimate is not None:
        axes.plot([estimate.low, estimate.high], [place, place], color=PALETTE[colour])
        axes.plot([estimate.value], [place], marker, color=PALETTE[colour], markersize=4.5)


def _name_points(
    axes: Axes, rows: Sequence[BatchRow], x: Callable[[BatchRow], Estimate], y: Callable[[BatchRow], Estimate]
) -> None:
    """Batch sizes beside the points of the last target."""
    for row in rows:
        axes.annotate(
            f"{row.batch_size}",
            (x(row).value, y(row).value),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7.5,
            color=PALETTE["muted"],
        )


def _over_batch_size(
    figure: Any, axes: Axes, found: Sequence[Finding], label: str, keys: Sequence[Key], *, log: bool = True
) -> Drawing:
    _batch_axis(axes, _sizes(found))
    if log:
        log_axis(axes)
    return finished_drawing(figure, axes, label, keys, x_label=BATCH_LABEL)


def _batch_axis(axes: Axes, sizes: Sequence[int], most: int = 10) -> None:
    """A log axis whose ticks are batch sizes that were run."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    shown = list(sizes)[:: max(1, -(-len(sizes) // most))]
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_x_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
