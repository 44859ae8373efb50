"""Landscapes as one self-contained HTML page: contours side by side on one scale, cuts through the middle, and a table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddp.landscape.finding import Asked, Landscape
from ddp.telemetry.charts import PALETTE, SETTINGS, Drawing, Key, finished_drawing, log_axis, new_figure
from ddp.telemetry.page_file import write_page
from ddp.telemetry.report_page import Card, Chart, cards_html, charts_html, document, table_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SQUARE_INCHES = (5.2, 4.3)
LEVELS = 13
FLAT = 1e-12  # of the loss: a surface that varies by less is drawn as a level one
LINE_COLOURS = ("blue", "orange", "green", "violet", "teal", "red", "sand")


def write_landscape_page(found: Sequence[Landscape], asked: Asked, path: Path) -> Path:
    """Write the page to `path` and return it. Needs matplotlib.

    Raises:
        UsageError: it cannot be written there.
    """
    return write_page(path, render(found, asked, time.time()))


def render(found: Sequence[Landscape], asked: Asked, unix_time: float) -> str:
    """The page's HTML. `unix_time` is now, to be shown."""
    import matplotlib

    levels = shared_levels([each.losses for each in found])
    scale = "Loss on a logarithmic scale." if _is_positive(found) else ""
    with matplotlib.rc_context(SETTINGS):
        charts = [Chart(each.name, _contours(each, asked.axis, levels), _caption(each)) for each in found]
        cuts = [
            Chart(f"Cut along {ordinal} direction", _cut(found, asked.axis, number), scale)
            for number, ordinal in enumerate(("the first", "the second"))
        ]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    footer = (
        f"Mean loss of {found[0].examples:,} {asked.split} examples in evaluation mode. Directions are random and "
        "filter-normalised (Li et al. 2018): each filter moves by its own norm times the coordinate; biases and normalisation "
        f"layers stay. Seed {asked.seed}. Mean rises are over eight more such directions, both ways. Made {made}."
    )
    return document(
        title="Loss landscape",
        notes=_notes(found),
        body=cards_html(_cards(found)) + charts_html([*charts, *cuts]) + _table(found),
        footer=footer,
    )


def shared_levels(surfaces: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Contours from the lowest loss of all to the highest, by equal factors; evenly where one is not above 0."""
    values = np.concatenate([each[np.isfinite(each)] for each in surfaces])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if high - low <= FLAT * max(abs(low), abs(high)):  # levels between would be one number
        margin = max(1.0, abs(low))
        return np.linspace(low - margin, low + margin, LEVELS)
    return np.geomspace(low, high, LEVELS) if low > 0 else np.linspace(low, high, LEVELS)


def _contours(found: Landscape, axis: NDArray[np.float64], levels: NDArray[np.float64]) -> Drawing:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    figure, axes = new_figure(SQUARE_INCHES)
    norm = BoundaryNorm(levels, 256)
    surface = np.clip(np.nan_to_num(found.losses, nan=levels[-1], posinf=levels[-1]), levels[0], levels[-1])
    axes.contourf(axis, axis, surface, levels=levels, norm=norm, cmap="viridis")
    lines = axes.contour(axis, axis, surface, levels=levels[1:-1:2], colors="white", linewidths=0.6, alpha=0.8)
    axes.clabel(lines, fmt=lambda value: f"{value:.2g}", fontsize=7, colors="white")
    axes.plot(0, 0, "+", color="#ffffff", markersize=9, markeredgewidth=1.6)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.set_ylabel("second direction")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _plain_ticks(axes)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, ticks=levels[::2], shrink=0.92)
    bar.ax.set_yticklabels([f"{value:.2g}" for value in levels[::2]])
    bar.outline.set_visible(False)  # type: ignore[operator]  # a patch, whatever the stubs say
    return finished_drawing(figure, axes, f"loss around {found.name}", [], x_label="first direction")


def _cut(found: Sequence[Landscape], axis: NDArray[np.float64], number: int) -> Drawing:
    figure, axes = new_figure()
    middle = len(axis) // 2
    keys: list[Key] = []
    for each, colour in zip(found, LINE_COLOURS * len(found), strict=False):
        losses = each.losses[middle] if number == 0 else each.losses[:, middle]
        axes.plot(axis, losses, color=PALETTE[colour])
        keys.append(Key(each.name, colour))
    if _is_positive(found):
        log_axis(axes)
    _plain_ticks(axes)
    return finished_drawing(figure, axes, "loss along a direction", keys, x_label=f"direction {number + 1}")


def _is_positive(found: Sequence[Landscape]) -> bool:
    values = np.concatenate([each.losses[np.isfinite(each.losses)] for each in found])
    return bool(len(values)) and float(values.min()) > 0


def _plain_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _caption(found: Landscape) -> str:
    return f"{found.optimizer}. Loss in the middle {found.loss:.4g}; one scale for all networks."


def _notes(found: Sequence[Landscape]) -> list[str]:
    notes: list[str] = []
    if len(found) > 1:
        farthest = [each.sharpness[-1].mean for each in found]
        order = sorted(range(len(found)), key=lambda number: (math.isnan(farthest[number]), farthest[number]))
        flat, sharp = found[order[0]], found[order[-1]]
        notes.append(
            f"Flattest: {flat.name}, whose loss rises by {farthest[order[0]]:.3g} on the mean at the radius "
            f"{flat.sharpness[-1].radius:g}; sharpest: {sharp.name}, by {farthest[order[-1]]:.3g}."
        )
    if len({each.architecture for each in found}) > 1:
        notes.append(
            "The networks are of different architectures: their directions have nothing in common but how they are drawn."
        )
    return notes


def _cards(found: Sequence[Landscape]) -> list[Card]:
    cards: list[Card] = []
    for each in found:
        rise = each.sharpness[-1]
        cards.append(Card(f"Mean rise, {each.name}", f"{rise.mean:.3g}", f"at the radius {rise.radius:g}"))
        value = each.largest_eigenvalue
        cards.append(
            Card(f"Curvature, {each.name}", "-" if math.isnan(value) else f"{value:.3g}", "largest Hessian eigenvalue")
        )
    return cards[:12]


def _table(found: Sequence[Landscape]) -> str:
    radii = [rise.radius for rise in found[0].sharpness]
    headings = ("network", "optimizer", "loss", *(f"rise at {radius:g}" for radius in radii), "largest eigenvalue")
    kinds = ("", "", "number", *["number"] * len(radii), "number")
    rows = [
        (
            each.name,
            each.optimizer,
            f"{each.loss:.4g}",
            *(f"{rise.mean:.4g} ± {rise.deviation:.2g}" for rise in each.sharpness),
            "-" if math.isnan(each.largest_eigenvalue) else f"{each.largest_eigenvalue:.4g}",
        )
        for each in found
    ]
    return table_html("Sharpness: mean rise of the loss, and its deviation among directions", headings, kinds, rows)
