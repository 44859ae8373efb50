"""The report's picture of the noise scale in every layer: layers down, the run across, colour for the number.

Colours go in steps, so that neighbours of one colour are one rectangle: the page stays small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ddp.noise.noise_scale import Reading
from ddp.noise.readings import Metric, Part
from ddp.telemetry.charts import PALETTE, Drawing, Key, finished_drawing, new_figure
from ddp.telemetry.recording import PartsMoment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

MOST_ROWS = 64  # more would be thinner than a line of text is high; those left out are spread over the model
MOST_LABELS = 32
LONGEST_LABEL = 26  # characters
MOST_COLOURS = 10
ROUND_NUMBERS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))  # in a decade, finest first


@dataclass(frozen=True)
class Cell:
    """How one stretch of one row looks."""

    level: int | None  # of the colour scale; None where nothing is known
    bound: bool  # the colour is that of a lower bound


@dataclass(frozen=True)
class Row:
    """One layer or group: what it looks like up to each moment, None where it was not observed."""

    label: str
    cells: tuple[Cell | None, ...]


def layer_chart(
    moments: Sequence[PartsMoment], metric: Metric, end_epoch: float, width_inches: float
) -> Drawing | None:
    """Layers and then groups in the model's order, top down; None where no reading of them is known.

    A lower bound (beyond the data too) has the colour of the bound under a hatch; unresolved is grey; what was
    not observed, as after the last sampled step, is empty.
    """
    levels = _levels(moments, metric)
    if levels is None:
        return None
    from matplotlib import colormaps

    rows = _rows(moments, metric, levels)
    figure, axes = new_figure((width_inches, 1.0 + 0.19 * max(len(rows), 6)))
    colours = colormaps["viridis"].resampled(len(levels) - 1)
    edges = _edges([moment.epoch for moment in moments])
    for place, row in enumerate(rows):
        _draw_row(axes, place, row, edges, colours)
    _label_rows(axes, [row.label for row in rows])
    axes.set_xlim(0.0, max(end_epoch, edges[-1]))
    _colour_bar(axes, levels, colours)
    cells = {cell for row in rows for cell in row.cells if cell}
    keys = [Key("lower bound only", "ink", "hatched")] if any(cell.bound for cell in cells) else []
    keys += [Key("unresolved", "grid", "bar")] if any(cell.level is None for cell in cells) else []
    return finished_drawing(figure, axes, "noise scale of each layer over epochs", keys)


def rows_left_out(moments: Sequence[PartsMoment]) -> int:
    """Layers and groups for which the picture has no room."""
    return max(len(_names(moments)) - MOST_ROWS, 0)


def _names(moments: Sequence[PartsMoment]) -> list[tuple[Part, str]]:
    """Layers in the order in which they first came, which is the model's, then groups."""
    names: list[tuple[Part, str]] = [(each.part, each.name) for moment in moments for each in moment.parts]
    return sorted(dict.fromkeys(names), key=lambda name: name[0] == "group")


def _levels(moments: Sequence[PartsMoment], metric: Metric) -> np.ndarray | None:
    """Edges of the colours: round numbers around the middle 96 % of what is known, None where nothing is."""
    shown = [_shown(each.reading) for moment in moments for each in moment.parts if each.metric == metric]
    known = [value for value in shown if 0 < value < math.inf]
    if not known:
        return None
    low, high = (float(end) for end in np.percentile(known, (2, 98)))
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for numbers in ROUND_NUMBERS:
        edges = np.array([number * 10.0**decade for decade in decades for number in numbers])
        first, last = np.searchsorted(edges, low, "right") - 1, np.searchsorted(edges, high)
        if last - first <= MOST_COLOURS:
            break
    return edges[first : last + 1]


def _shown(reading: Reading) -> float:
    """The number that has a colour: the estimate, the bound where only that is known, else NaN."""
    match reading.state:
        case "resolved" | "wide":
            return reading.noise_scale
        case "lower_bound" | "beyond_data":
            return reading.low
        case "unresolved":
            return math.nan


def _rows(moments: Sequence[PartsMoment], metric: Metric, levels: np.ndarray) -> list[Row]:
    names = _names(moments)
    if len(names) > MOST_ROWS:
        names = [names[round(i * (len(names) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    columns = [
        {(each.part, each.name): _cell(each.reading, levels) for each in moment.parts if each.metric == metric}
        for moment in moments
    ]
    return [
        Row(f"group {name}" if part == "group" else name, tuple(column.get((part, name)) for column in columns))
        for part, name in names
    ]


def _cell(reading: Reading, levels: np.ndarray) -> Cell:
    value = _shown(reading)
    if not value > 0:
        return Cell(None, bound=False)
    level = int(np.clip(np.searchsorted(levels, value) - 1, 0, len(levels) - 2))
    return Cell(level, bound=reading.state in ("lower_bound", "beyond_data"))


def _edges(epochs: Sequence[float]) -> list[float]:
    """A reading stands for the stretch since the one before; the first one for as long a stretch as the second."""
    first = epochs[0] - (epochs[1] - epochs[0] if len(epochs) > 1 else epochs[0] or 1.0)
    return [max(first, 0.0), *epochs]


def _draw_row(axes: Axes, place: int, row: Row, edges: Sequence[float], colours: Colormap) -> None:
    column = 0
    for cell, group in groupby(row.cells):
        start, column = column, column + len(list(group))
        if cell is not None:
            axes.barh(
                place,
                edges[column] - edges[start],
                left=edges[start],
                height=0.9,
                color=PALETTE["grid"] if cell.level is None else colours(cell.level),
                edgecolor=PALETTE["ink"],  # the hatch's
                hatch="////" if cell.bound else None,
                linewidth=0,
            )


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    every = math.ceil(len(labels) / MOST_LABELS)
    shown = range(0, len(labels), every)
    axes.set_yticks(list(shown), [_short(labels[place]) for place in shown], fontsize=7.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False)


def _short(label: str) -> str:
    """The end says more than the beginning: layers of one block have that in common."""
    return label if len(label) <= LONGEST_LABEL else "…" + label[1 - LONGEST_LABEL :]


def _colour_bar(axes: Axes, levels: np.ndarray, colours: Colormap) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    scale = ScalarMappable(BoundaryNorm(levels.tolist(), len(levels) - 1), colours)
    bar = axes.get_figure(root=True).colorbar(scale, ax=axes, fraction=0.03, pad=0.01)  # type: ignore[union-attr]
    bar.set_ticks(levels.tolist(), labels=[f"{level:,.6g}" for level in levels])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0, labelsize=7.5)
