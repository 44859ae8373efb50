"""The figures of a sweep: trials in, one inline SVG a figure out. Needs matplotlib.

Each dimension against what a trial cost and came to, one panel each; one colour a stage. Pruned trials are open, with
what they had when they were ended; of trials that diverged there is nothing but their place, at the upper edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddp.sweep.dimensions import Dimension, toml_to_value
from ddp.sweep.findings import Findings
from ddp.sweep.trials import Trial, TrialResult
from ddp.telemetry.charts import PALETTE, SIZE_INCHES, WIDE_INCHES, Drawing, Key, finished_drawing, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("blue", "orange", "green", "violet", "teal", "sand")
NARROW_INCHES = (SIZE_INCHES[0], 5.0)
LOG_FROM = 20.0  # largest over smallest value, from which a panel is logarithmic
MANY_CHOICES = 4
EDGE = 0.04  # of a range's width, beside it


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity of a trial, as it is drawn."""

    label: str
    value: Callable[[TrialResult], float]
    from_zero: bool = False


def panels(found: Findings) -> tuple[Panel, ...]:
    """Training error, validation error, memory and run time; an accuracy is drawn as the error that it leaves."""
    is_accuracy = "accuracy" in found.metric and found.goal == "max"
    name = "error" if is_accuracy else found.metric

    def error(value: float) -> float:
        return 1 - value if is_accuracy else value

    return (
        Panel(f"training {name}", lambda result: error(result.training_value)),
        Panel(f"validation {name}", lambda result: error(result.value)),
        Panel("memory, MiB", lambda result: result.peak_memory_bytes / 2**20 or math.nan, from_zero=True),
        Panel("run time, s", lambda result: result.seconds, from_zero=True),
    )


def dimension_chart(found: Findings, dimension: Dimension, *, wide: bool) -> Drawing:
    """All trials that `dimension` counts in: four panels in a row, or two by two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=WIDE_INCHES if wide else NARROW_INCHES, layout="constrained")
    all_axes = figure.subplots(1, 4) if wide else figure.subplots(2, 2)
    drawn = panels(found)
    for axes, panel in zip(all_axes.flat, drawn, strict=True):
        _draw(axes, found, dimension, panel)
    last = all_axes.flat[-1]
    label = f"{dimension.key} against {', '.join(panel.label for panel in drawn)}"
    return finished_drawing(figure, last, label, _keys(found, dimension), x_label="")


def progress_chart(found: Findings, *, wide: bool) -> Drawing:
    """Trials in the order of their beginning, and the best so far of each stage."""
    figure, axes = new_figure(WIDE_INCHES if wide else SIZE_INCHES)
    panel, before = panels(found)[1], 0
    for each, colour in zip(found.stages, _colours(found), strict=True):
        _points(axes, list(each.trials), lambda trial, offset=before: offset + trial.number + 1, panel, colour)
        best, xs, ys = math.inf, [], []
        for trial in each.trials:
            if trial.is_complete and trial.result is not None and trial.cost < best:
                best = trial.cost
                xs.append(before + trial.number + 1)
                ys.append(panel.value(trial.result))
        if xs:
            axes.step([*xs, before + len(each.trials)], [*ys, ys[-1]], where="post", color=PALETTE[colour], linewidth=1)
        before += len(each.trials)
    _value_axis(axes, panel)
    axes.set_ylabel(panel.label)
    return finished_drawing(figure, axes, f"{panel.label} over trials", _stage_keys(found), x_label="trial")


def importance_chart(importance: dict[str, float]) -> Drawing:
    """Shares of the cost that dimensions explain, largest first."""
    figure, axes = new_figure((SIZE_INCHES[0], 0.8 + 0.32 * len(importance)))
    places = range(len(importance))
    axes.barh(places, [100 * share for share in importance.values()], height=0.55, color=PALETTE["violet"])
    axes.set_yticks(places, list(importance))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    return finished_drawing(figure, axes, "importance of dimensions", [], x_label="per cent of what is explained")


def _draw(axes: Axes, found: Findings, dimension: Dimension, panel: Panel) -> None:
    places = _places(dimension)
    for each, colour in zip(found.stages, _colours(found), strict=True):
        trials = [trial for trial in each.trials if dimension.key in trial.values]
        _points(axes, trials, lambda trial: places(trial.values[dimension.key]), panel, colour)
    best = found.best
    if best is not None and best.result is not None and dimension.key in best.values:
        at = places(best.values[dimension.key]), panel.value(best.result)
        axes.plot(*at, "o", color=PALETTE["ink"], markerfacecolor="none", markersize=8, markeredgewidth=1.2)
    _value_axis(axes, panel)
    axes.set_title(panel.label, fontsize=9, color=PALETTE["muted"], loc="left")
    _dimension_axis(axes, dimension)


def _points(axes: Axes, trials: Sequence[Trial], place: Callable[[Trial], float], panel: Panel, colour: str) -> None:
    ended = [(trial, trial.result) for trial in trials if trial.result is not None]
    style: dict[str, Any] = {"color": PALETTE[colour], "markersize": 4, "linestyle": "none", "markeredgewidth": 1}
    for state, face in (("complete", PALETTE[colour]), ("pruned", "none")):
        chosen = [(trial, result) for trial, result in ended if result.state == state]
        xs, ys = [place(trial) for trial, _ in chosen], [panel.value(result) for _, result in chosen]
        axes.plot(xs, ys, marker="o", markerfacecolor=face, alpha=0.85, **style)
    lost = [place(trial) for trial, result in ended if result.state == "diverged"]
    at_the_edge = axes.get_xaxis_transform()
    axes.plot(lost, [0.985] * len(lost), marker="x", transform=at_the_edge, **{**style, "color": PALETTE["red"]})


def _places(dimension: Dimension) -> Callable[[Any], float]:
    """Where a value lies on the axis: words side by side."""
    if dimension.is_ordered:
        return float
    names = {toml_key(toml_to_value(text)): float(place) for place, text in enumerate(dimension.choices)}
    return lambda value: names.get(toml_key(value), math.nan)


def toml_key(value: Any) -> str:
    """Something that lists can be told apart by."""
    return repr(value)


def _dimension_axis(axes: Axes, dimension: Dimension) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if not dimension.is_ordered:
        names = [text.strip('"') for text in dimension.choices]
        rotation = 0 if len(names) < MANY_CHOICES and max(map(len, names)) < 2 * MANY_CHOICES else 30
        axes.set_xticks(range(len(names)), names, rotation=rotation, ha="right" if rotation else "center")
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif dimension.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=dimension.kind == "int"))
    if dimension.kind == "int":
        axes.set_xlim(dimension.low - 0.5, dimension.high + 0.5)
    elif dimension.kind == "float":
        axes.set_xlim(dimension.at(-EDGE), dimension.at(1 + EDGE))


def _value_axis(axes: Axes, panel: Panel) -> None:
    """Logarithmic where values span much; with nothing finite on it as it is."""
    values = [float(y) for line in axes.lines for y in _own_values(axes, line)]
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > LOG_FROM * min(finite):
        log_axis(axes)
    elif finite and panel.from_zero:
        axes.set_ylim(0, 1.15 * max(finite))


def _own_values(axes: Axes, line: Any) -> list[float]:
    return list(line.get_ydata()) if line.get_transform() == axes.transData else []


def _colours(found: Findings) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(found.stages))]


def _stage_keys(found: Findings) -> list[Key]:
    return [Key(each.stage.name, colour, "bar") for each, colour in zip(found.stages, _colours(found), strict=True)]


def _keys(found: Findings, dimension: Dimension) -> list[Key]:
    in_it = [
        key
        for key, each in zip(_stage_keys(found), found.stages, strict=True)
        if any(dimension.key in trial.values for trial in each.trials)
    ]
    diverged = any(
        trial.result is not None and trial.result.state == "diverged" for each in found.stages for trial in each.trials
    )
    return [*in_it, *([Key("diverged", "red", "bar")] if diverged else [])]
