"""Histograms of every layer over time, as ridges: one row a layer, early steps behind, the latest in front.

Values run from the most negative to the largest on a scale that is logarithmic to both sides of zero, as the bins are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ddp.telemetry.charts import PALETTE, Drawing, Key, finished_drawing
from ddp.telemetry.layer_charts import layers_with, short, spread
from ddp.telemetry.records import LayersRecord
from ddp.watching.histogram import SMALLEST_EXPONENT, Histogram, magnitudes
from ddp.watching.layers import LayerStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 10
MOST_RIDGES = 5
ROW_INCHES = 0.72
RISE = 0.4  # of a row's height, from one ridge to the one behind
CROWDED = 0.15  # of the span to one side: so near zero a number would run into its
SHOWN_SHARE = 0.999  # of the values; the rest lies farther out

CARD = "#fefefd"  # stands for the page's colour behind a figure, which hides what lies behind a ridge

What = Literal["activations", "gradients"]
Ridge = tuple[int, Histogram]  # step, counts


def histogram_chart(looks: Sequence[LayersRecord], what: What, width_inches: float) -> Drawing | None:
    """One row for each of at most `MOST_ROWS` layers; None where no histogram was kept."""
    from matplotlib.figure import Figure

    looks = [look for look in looks if any(getattr(layer, what) is not None for layer in look.layers)]
    names = spread(layers_with(looks, lambda layer: _values_of(layer, what)), MOST_ROWS)
    if not names:
        return None
    chosen = [looks[round(i * (len(looks) - 1) / (MOST_RIDGES - 1))] for i in range(MOST_RIDGES)]
    chosen = list({look.step: look for look in chosen}.values())
    ridges = {name: _ridges(chosen, name, what) for name in names}
    low, high = _range([histogram for each in ridges.values() for _, histogram in each])
    figure = Figure(figsize=(width_inches, 0.55 + ROW_INCHES * len(names)), layout="constrained")
    all_axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    kinds = {layer.name: layer.kind for look in chosen for layer in look.layers}
    for axes, name in zip(all_axes, names, strict=True):
        _draw_row(axes, f"{short(name)} ({kinds[name]})", ridges[name], low, high)
    _label_values(all_axes[-1], low, high)
    steps = ", ".join(f"{look.step:,}" for look in chosen)
    key = Key(f"steps {steps}, the latest in front", "blue", "band")
    drawing = finished_drawing(figure, all_axes[-1], f"histograms of {what}", [key], "value")
    return Drawing(drawing.svg.replace(CARD, "var(--card)"), drawing.legend)


def _values_of(layer: LayerStatistics, what: What) -> float:
    histogram: Histogram | None = getattr(layer, what)
    return math.nan if histogram is None or not histogram.total else float(histogram.total)


def _ridges(looks: Sequence[LayersRecord], name: str, what: What) -> list[Ridge]:
    found = (
        (look.step, next((getattr(each, what) for each in look.layers if each.name == name), None)) for look in looks
    )
    return [(step, histogram) for step, histogram in found if histogram is not None and histogram.total]


def _octaves(histogram: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Shares by octave, negative ones from the smallest magnitude on, positive ones likewise, and the share around zero."""
    counts = np.array(histogram.counts, dtype=float) / histogram.total
    half = magnitudes(histogram.bins_per_octave)
    negative, positive = counts[:half][::-1], counts[half + 1 :]
    shape = (-1, histogram.bins_per_octave)
    return negative.reshape(shape).sum(1), positive.reshape(shape).sum(1), float(counts[half])


def _range(histograms: Sequence[Histogram]) -> tuple[int, int]:
    """The octaves, by exponent, between which nearly all values of all histograms lie."""
    both = sum((np.add(*_octaves(each)[:2]) for each in histograms), np.zeros(1))
    total = both.sum()
    if not total > 0:
        return -1, 1
    running = np.cumsum(both) / total
    low = int(np.searchsorted(running, (1 - SHOWN_SHARE) / 2)) + SMALLEST_EXPONENT
    high = int(np.searchsorted(running, 1 - (1 - SHOWN_SHARE) / 2)) + SMALLEST_EXPONENT + 1
    return low, max(high, low + 1)


def _draw_row(axes: Axes, label: str, ridges: Sequence[Ridge], low: int, high: int) -> None:
    """The earliest is drawn first and highest, so that later ones stand before it."""
    curves = [_curve(histogram, low, high) for _, histogram in ridges]
    tallest = max((curve.max() for curve in curves), default=1.0) or 1.0
    places = np.arange(len(curves[0])) - (high - low) if curves else np.arange(1)
    for number, curve in enumerate(curves):
        age = len(curves) - 1 - number
        base, strength = RISE * age, 0.75 - 0.5 * age / max(len(curves) - 1, 1)
        axes.fill_between(places, base, base + curve / tallest, color=CARD, linewidth=0)
        axes.fill_between(places, base, base + curve / tallest, color=PALETTE["blue"], alpha=strength, linewidth=0)
    axes.axvline(0, color=PALETTE["muted"], linewidth=0.6)
    axes.set_ylim(0, 1.05 + RISE * (len(curves) - 1))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.set_title(label, loc="left", fontsize=7.5, pad=1.5, color=PALETTE["ink"])


def _curve(histogram: Histogram, low: int, high: int) -> NDArray[np.float64]:
    """Shares from the largest negative octave over zero to the largest positive one: 2 (high - low) + 1 of them."""
    negative, positive, zero = _octaves(histogram)
    window = slice(low - SMALLEST_EXPONENT, high - SMALLEST_EXPONENT)
    below = zero + negative[: window.start].sum() + positive[: window.start].sum()
    return np.concatenate([negative[window][::-1], [below], positive[window]])


def _label_values(axes: Axes, low: int, high: int) -> None:
    """Powers of ten to both sides, and zero."""
    span = high - low
    first, last = math.ceil(low * math.log10(2)), math.floor(high * math.log10(2))
    every = max(1, math.ceil((last - first + 1) / 4))
    exponents = range(last, first - 1, -every)
    places = [exponent / math.log10(2) - low + 0.5 for exponent in exponents]
    exponents = [each for each, place in zip(exponents, places, strict=True) if place > CROWDED * span]
    places = places[: len(exponents)]
    axes.set_xticks(
        [*(-place for place in places), 0, *places],
        [*(f"-{10.0**each:g}" for each in exponents), "0", *(f"{10.0**each:g}" for each in exponents)],
    )
    axes.set_xlim(-span - 0.5, span + 0.5)
