"""The report's figures: numbers in, one inline SVG a figure out. Needs matplotlib (the `report` extra).

Colours are drawn as the light palette's and come out as CSS variables, so that the page decides (a dark
scheme, print). Text stays text. No figure knows about files or pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddp.telemetry.records import PHASES, EvaluationRecord, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "ink": "#1b2430",
    "muted": "#6a7586",
    "grid": "#e4e8ee",
    "blue": "#2563eb",
    "orange": "#d9660a",
    "green": "#15925a",
    "red": "#d1344b",
    "violet": "#7c4ddb",
    "teal": "#0b8c9c",
    "sand": "#b58a1b",
}
PHASE_COLOURS = dict(zip(PHASES, ("sand", "blue", "violet", "teal", "red", "green"), strict=True))
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SPLIT_COLOURS = {"training": "green", "validation": "orange", "validation, averaged weights": "violet"}
SIZE_INCHES = (5.2, 2.9)  # text keeps a readable size from a phone's width to half a page's
WIDE_INCHES = (10.4, 3.4)
LOW_INCHES = (5.2, 2.3)
DASHED: dict[str, Any] = {"linewidth": 1.3, "linestyle": (0, (5, 3))}
SETTINGS: dict[Any, Any] = {  # keys are matplotlib's own literal type
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["grid"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "ytick.left": False,
    "ytick.minor.left": False,
    "xtick.minor.bottom": False,
    "axes.formatter.useoffset": False,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

Steps = Sequence[StepRecord]
Evaluations = Sequence[EvaluationRecord]


@dataclass(frozen=True)
class Key:
    """One entry of a legend; `style` is how its sample looks: line, faint, dashed, dotted, band, bar or hatched."""

    label: str
    colour: str  # a name of PALETTE
    style: str = "line"


@dataclass(frozen=True)
class Drawing:
    """An `<svg>` element and its legend, which the page sets in text that wraps."""

    svg: str
    legend: tuple[Key, ...] = ()


def loss_chart(steps: Steps, evaluations: Evaluations) -> Drawing:
    """Each step's loss, its running mean, and both evaluated splits, over epochs, on a log scale."""
    figure, axes = new_figure()
    epochs, losses = _column(steps, "epoch"), _column(steps, "loss")
    axes.plot(epochs, losses, color=PALETTE["blue"], alpha=0.25, linewidth=0.8)
    axes.plot(epochs, running_mean(losses, max(1, len(losses) // 40)), color=PALETTE["blue"])
    keys = [Key("each step", "blue", "faint"), Key("running mean", "blue")]
    for split, colour in SPLIT_COLOURS.items():
        chosen = [record for record in evaluations if record.split == split]
        keys += _line(axes, chosen, [record.loss for record in chosen], colour, split)
    keys += _with_penalty(axes, [record for record in evaluations if record.split == "validation"])
    log_axis(axes)
    return finished_drawing(figure, axes, "loss over epochs", keys)


def _with_penalty(axes: Axes, evaluations: Evaluations) -> list[Key]:
    """The same loss with what weight decay adds to it; nothing where it adds nothing."""
    if not any(record.penalty > 0 for record in evaluations):
        return []
    epochs = [record.epoch for record in evaluations]
    axes.plot(epochs, [record.loss + record.penalty for record in evaluations], color=PALETTE["orange"], **DASHED)
    return [Key("validation with weight decay's penalty", "orange", "dashed")]


def metric_chart(steps: Steps, evaluations: Evaluations, metric: str, target: float | None) -> Drawing:
    """The watched metric: running mean over training's steps where they give it, evaluated splits, the target."""
    figure, axes = new_figure()
    keys: list[Key] = []
    of_steps = _column(steps, "metric")
    if np.isfinite(of_steps).any():
        mean = running_mean(of_steps, max(1, len(of_steps) // 40))
        axes.plot(_column(steps, "epoch"), mean, color=PALETTE["blue"], linewidth=1.2)
        keys.append(Key("training steps, running mean", "blue"))
    for split, colour in SPLIT_COLOURS.items():
        chosen = [record for record in evaluations if record.split == split and metric in record.metrics]
        keys += _line(axes, chosen, [record.metrics[metric] for record in chosen], colour, split)
    if target is not None:
        axes.axhline(target, color=PALETTE["red"], **DASHED)
        keys.append(Key(f"target {target:g}", "red", "dashed"))
    if "accuracy" in metric:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    return finished_drawing(figure, axes, f"{metric} over epochs", keys)


def learning_rate_chart(steps: Steps) -> Drawing:
    return _setting_chart(steps, "learning_rate", "violet")


def momentum_chart(steps: Steps) -> Drawing:
    return _setting_chart(steps, "momentum", "teal")


def _setting_chart(steps: Steps, name: str, colour: str) -> Drawing:
    figure, axes = new_figure(LOW_INCHES)
    axes.plot(_column(steps, "epoch"), _column(steps, name), color=PALETTE[colour])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return finished_drawing(figure, axes, f"{name.replace('_', ' ')} over epochs", [])


def changes(steps: Steps, name: str) -> bool:
    """Whether that number of the steps is known and not the same in all of them."""
    known = _column(steps, name)
    known = known[np.isfinite(known)]
    return len(known) > 0 and bool(np.ptp(known) > 0)


def phase_chart(phase_seconds: Sequence[Mapping[str, float]]) -> Drawing:
    """Mean time of a step by phase, one bar a rank."""
    figure, axes = new_figure((LOW_INCHES[0], max(LOW_INCHES[1], 0.8 + 0.3 * len(phase_seconds))))
    ranks = np.arange(len(phase_seconds))
    left = np.zeros(len(phase_seconds))
    for phase, colour in PHASE_COLOURS.items():
        width = np.nan_to_num([1000 * seconds[phase] for seconds in phase_seconds])
        axes.barh(ranks, width, left=left, height=0.5, color=PALETTE[colour], edgecolor="none")
        left += width
    shown = ranks[:: max(1, len(ranks) // 32)]
    axes.set_yticks(shown, [f"rank {rank}" for rank in shown])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    keys = [Key(phase.replace("_", "-"), colour, "bar") for phase, colour in PHASE_COLOURS.items()]
    return finished_drawing(figure, axes, "time of a step by phase and rank", keys, x_label="milliseconds a step, mean")


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the `width` values up to each one (of fewer at the start); NaN are left out."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known).astype(float)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def new_figure(size_inches: tuple[float, float] = SIZE_INCHES) -> tuple[Figure, Axes]:
    """A figure in the page's style, under `SETTINGS`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    return figure, figure.add_subplot()


def finished_drawing(figure: Figure, axes: Axes, label: str, keys: Sequence[Key], x_label: str = "epoch") -> Drawing:
    """The figure as an `<svg>` element that takes the width it is given; `label` is for those who hear it."""
    axes.set_xlabel(x_label)
    axes.margins(x=0.01)
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head = f'<svg viewBox="{_view_box(svg)}" role="img" aria-label="{escape(label)}" {NAMESPACES}>'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure, and nothing refers to them
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Drawing(svg, tuple(keys))


def log_axis(axes: Axes) -> None:
    """A log scale with plain numbers on it, and enough of them where it spans little."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if 1 <= value < 1e7 else f"{value:g}")


def _view_box(svg: str) -> str:
    return svg.partition('viewBox="')[2].partition('"')[0]


def _column(records: Sequence[StepRecord], name: str) -> NDArray[np.float64]:
    return np.array([getattr(record, name) for record in records], dtype=float)


def _line(axes: Axes, records: Evaluations, values: Sequence[float], colour: str, label: str) -> list[Key]:
    if not records:
        return []
    epochs = [record.epoch for record in records]
    axes.plot(epochs, values, color=PALETTE[colour], marker="o" if len(records) <= 40 else None, markersize=3.2)
    return [Key(label, colour)]
