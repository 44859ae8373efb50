"""The report's figures of the recorded parameters: their entries' values, and how large their gradients are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ddp.telemetry.charts import PALETTE, Drawing, Key, finished_drawing, log_axis, new_figure
from ddp.telemetry.recorded_parameters import Trajectory
from ddp.telemetry.report_page import Chart

COLOURS = ("blue", "orange", "green", "violet", "teal", "red")  # one a parameter


def parameter_charts(trajectories: Sequence[Trajectory]) -> list[Chart]:
    """Nothing where no parameter was recorded."""
    if not trajectories:
        return []
    named: dict[str, list[Trajectory]] = {}
    for each in trajectories:
        named.setdefault(each.parameter, []).append(each)
    charts = [Chart("Recorded parameters", _values(named), "Evenly spread entries; all of them are in run.db.")]
    if any(size > 0 for entries in named.values() for size in _sizes(entries)[1]):
        caption = "Root mean square over the recorded entries, before clipping, log scale."
        charts.append(Chart("Gradients of recorded parameters", _gradients(named), caption))
    return charts


def _values(named: dict[str, list[Trajectory]]) -> Drawing:
    figure, axes = new_figure()
    for colour, entries in zip(COLOURS, named.values(), strict=False):
        for each in entries:
            axes.plot(each.epochs, each.values, color=PALETTE[colour], linewidth=1.0, alpha=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return finished_drawing(figure, axes, "values of recorded parameters over epochs", _keys(named))


def _gradients(named: dict[str, list[Trajectory]]) -> Drawing:
    figure, axes = new_figure()
    for colour, entries in zip(COLOURS, named.values(), strict=False):
        epochs, sizes = _sizes(entries)
        axes.plot(epochs, sizes, color=PALETTE[colour], linewidth=1.2)
    log_axis(axes)
    return finished_drawing(figure, axes, "size of the gradients of recorded parameters over epochs", _keys(named))


def _sizes(entries: Sequence[Trajectory]) -> tuple[list[float], list[float]]:
    """Epochs, and the root mean square of the finite gradients then; a resumed run may have recorded other entries."""
    squares: dict[float, list[float]] = {}
    for each in entries:
        for epoch, gradient in zip(each.epochs, each.gradients, strict=True):
            if math.isfinite(gradient):
                squares.setdefault(epoch, []).append(gradient**2)
    epochs = sorted(squares)
    return epochs, [math.sqrt(statistics.fmean(squares[epoch])) for epoch in epochs]


def _keys(named: dict[str, list[Trajectory]]) -> list[Key]:
    return [Key(name, colour) for colour, name in zip(COLOURS, named, strict=False)]
