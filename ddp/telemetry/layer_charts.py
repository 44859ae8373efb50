"""The report's pictures of the layers: updates against weights, units out of play, histograms, the first layer's weights.

Colours are those of the page (`charts.PALETTE`). Where a picture has one colour for each of many things, it says more by how
strong that colour is, which holds on a dark page too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp.telemetry.charts import DASHED, PALETTE, Drawing, Key, finished_drawing, log_axis, new_figure
from ddp.telemetry.records import EvaluationRecord, LayersRecord
from ddp.watching.gap_findings import LARGE_GAP
from ddp.watching.layer_findings import AIM, MANY_UNITS
from ddp.watching.layers import LayerStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 7  # layers with a colour of their own
COLOURS = ("blue", "orange", "green", "violet", "teal", "sand", "red")
LONGEST_NAME = 30  # characters

Looks = Sequence[LayersRecord]


def ratio_chart(looks: Looks, size_inches: tuple[float, float]) -> Drawing | None:
    """Update norm over weight norm of each layer, over steps, on a log scale; None without any."""
    names = layers_with(looks, lambda layer: layer.update_ratio)
    if not names:
        return None
    figure, axes = new_figure(size_inches)
    keys = _lines(axes, looks, names, lambda layer: layer.update_ratio)
    axes.axhline(AIM, color=PALETTE["ink"], **DASHED)
    log_axis(axes)
    keys.append(Key("aim: 0.001", "ink", "dashed"))
    return finished_drawing(
        figure, axes, "norm of the update over that of the weights, by layer over steps", keys, "step"
    )


def lost_units_chart(looks: Looks, size_inches: tuple[float, float]) -> Drawing | None:
    """Shares of dead and of saturated units of each activation function over steps; None without any."""

    def share(layer: LayerStatistics) -> float:
        return (layer.dead_units + layer.saturated_units) / layer.units if layer.units else math.nan

    names = layers_with(looks, share)
    if not names:
        return None
    figure, axes = new_figure(size_inches)
    keys = _lines(axes, looks, names, share)
    axes.axhline(MANY_UNITS, color=PALETTE["red"], **DASHED)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    keys.append(Key("many", "red", "dashed"))
    return finished_drawing(figure, axes, "share of dead or saturated units, by layer over steps", keys, "step")


def gap_chart(evaluations: Sequence[EvaluationRecord], metric: str, size_inches: tuple[float, float]) -> Drawing | None:
    """Training less validation accuracy, in points over epochs; None where the metric is no accuracy."""
    values = {(record.step, record.split): record.value(metric) for record in evaluations}
    epochs = {record.step: record.epoch for record in evaluations}
    gaps: list[tuple[float, float]] = []
    for step, epoch in sorted(epochs.items()):
        training, validation = values.get((step, "training")), values.get((step, "validation"))
        if training is not None and validation is not None:
            gaps.append((epoch, 100 * (training - validation)))
    if "accuracy" not in metric or not gaps:
        return None
    figure, axes = new_figure(size_inches)
    axes.plot(
        *zip(*gaps, strict=True), color=PALETTE["violet"], marker="o" if len(gaps) <= 40 else None, markersize=3.2
    )
    axes.axhline(0, color=PALETTE["muted"], linewidth=0.8)
    keys = [Key("training less validation, in points", "violet")]
    if max(gap for _, gap in gaps) > 50 * LARGE_GAP:
        axes.axhline(100 * LARGE_GAP, color=PALETTE["red"], **DASHED)
        keys.append(Key("large", "red", "dashed"))
    return finished_drawing(figure, axes, "gap between training and validation accuracy", keys)


def layers_with(looks: Looks, value: Callable[[LayerStatistics], float]) -> list[str]:
    """Names of the layers that have a finite value in some look, in the order in which they were called."""
    names = dict.fromkeys(layer.name for look in looks for layer in look.layers if math.isfinite(value(layer)))
    return list(names)


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def short(name: str) -> str:
    """The end says more than the beginning: layers of one block have that in common."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _lines(axes: Axes, looks: Looks, names: Sequence[str], value: Callable[[LayerStatistics], float]) -> list[Key]:
    """One line a layer, with a colour for some of them and one pale colour for the rest."""
    steps = [look.step for look in looks]
    shown = dict(zip(spread(names, MOST_LINES), COLOURS, strict=False))
    kinds = {layer.name: layer.kind for look in looks for layer in look.layers}
    for name in sorted(names, key=lambda each: each in shown):
        found = [next((value(layer) for layer in look.layers if layer.name == name), math.nan) for look in looks]
        marker = "o" if len(looks) <= 40 and name in shown else None
        colour, width = PALETTE[shown.get(name, "muted")], 1.5 if name in shown else 0.7
        drawn = np.where(np.array(found) > 0, found, math.nan) if axes.get_yscale() == "log" else found
        axes.plot(steps, drawn, color=colour, linewidth=width, marker=marker, markersize=2.8)
    keys = [Key(f"{short(name)} ({kinds[name]})", colour) for name, colour in shown.items()]
    if len(names) > len(shown):
        keys.append(Key(f"{len(names) - len(shown)} others", "muted"))
    return keys
