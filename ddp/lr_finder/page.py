"""A finding as one self-contained HTML page: the suggestions, a figure for each pass, and a table."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ddp.lr_finder.finding import Finding, RangePass, rate_text
from ddp.telemetry.charts import DASHED, PALETTE, SETTINGS, Drawing, Key, finished_drawing, new_figure
from ddp.telemetry.page_file import write_page
from ddp.telemetry.report_page import Card, Chart, cards_html, charts_html, document, table_html

ROWS = (  # of the table: what, and the attribute of the features
    ("A tenth of the descent", "start"),
    ("Half-way down", "half_way"),
    ("Falls fastest", "steepest"),
    ("Minimum", "minimum"),
    ("Half of it lost again", "half_way_up"),
    ("Blows up", "blow_up"),
)
ABOVE = 1.25  # times the height of what is of interest: the axis ends there, a blow-up does not fit


def write_finding_page(found: Finding, path: Path, task: str) -> Path:
    """Write the page to `path` and return it. Needs matplotlib.

    Raises:
        UsageError: it cannot be written there.
    """
    return write_page(path, render(found, task, time.time()))


def render(found: Finding, task: str, unix_time: float) -> str:
    """The page's HTML. `unix_time` is now, to be shown."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    scaled = (
        ""
        if found.batch_factor == 1
        else f" The optimizer saw {found.batch_factor:.3g} times each rate, by the batch's rule."
    )
    again = f" A pass went through the training set {found.epochs:.1f} times." if found.epochs > 1 else ""
    setting = "" if found.setting is None else f"Use it: {found.setting}"
    body = cards_html(_cards(found)) + charts_html(_charts(found)) + _table(found)
    footer = (
        "Loss of each step, over all ranks, after the update at a rate; smoothed forwards and backwards, so that it is not late."
        f"{scaled}{again} The model was put back as it was. Made {made}."
    )
    notes = [note for note in (found.verdict, setting) if note]
    return document(title=f"Learning rate for {task}, {found.optimizer}", notes=notes, body=body, footer=footer)


def _cards(found: Finding) -> list[Card]:
    rates = (
        ("Recommended", found.recommended, "middle of the valley" if found.half_way_up else "half-way down"),
        ("Half-way down", found.half_way, "half of the descent done"),
        ("Steepest", found.steepest, "the loss falls fastest"),
        ("Half-way up", found.half_way_up, "half of it lost again"),
    )
    cards = [Card(title, "no value" if rate is None else rate_text(rate), detail) for title, rate, detail in rates]
    return [*cards, Card("The job's own", rate_text(found.learning_rate), f"batches of {found.global_batch_size:,}")]


def _charts(found: Finding) -> list[Chart]:
    import matplotlib

    names = ("First pass", "Zoomed pass")
    with matplotlib.rc_context(SETTINGS):
        return [
            Chart(name, _drawing(each, found), _caption(each))
            for name, each in zip(names, found.passes, strict=False)
            if each.curve.rates
        ]


def _caption(each: RangePass) -> str:
    ends = {
        "range": "to the end of its range",
        "blown up": "until the loss blew up",
        "not finite": "until it was not finite",
    }
    per_decade = each.steps / np.log10(each.high / each.low)
    return f"{len(each.curve.rates)} rates, {per_decade:.0f} to a factor of ten, {ends[each.curve.end]}."


def _drawing(each: RangePass, found: Finding) -> Drawing:
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = new_figure()
    rates, losses = np.array(each.curve.rates), np.array(each.curve.losses[1:])
    axes.plot(rates, losses, "o", color=PALETTE["muted"], alpha=0.45, markersize=2.2, markeredgewidth=0)
    keys = [Key("loss of a step", "muted", "faint")]
    if each.features.smoothed:
        axes.plot(rates, each.features.smoothed, color=PALETTE["blue"])
        keys.append(Key("smoothed", "blue"))
    marks = (
        ("recommended", found.recommended, "green", "line", {"linewidth": 1.6}),
        ("half-way down", found.half_way, "violet", "dashed", DASHED),
        ("steepest", found.steepest, "orange", "dotted", {"linewidth": 1.8, "linestyle": (0, (1, 2))}),
    )
    for label, rate, colour, style, how in marks:
        if rate is not None and rates[0] <= rate <= rates[-1]:
            axes.axvline(rate, color=PALETTE[colour], **how)
            keys.append(Key(f"{label} {rate_text(rate)}", colour, style))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(*_window(losses, each))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return finished_drawing(figure, axes, "loss over learning rate", keys, x_label="learning rate")


def _window(losses: np.ndarray, each: RangePass) -> tuple[float, float]:
    """Of the axis: all that lies below the blow-up."""
    low, before = float(losses.min()), each.features.baseline
    high = float(losses.max()) if before is None else before.loss + max(before.loss - low, 4 * before.noise)
    high = min(high, float(losses.max()))
    margin = (ABOVE - 1) * (high - low) / 2 or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _table(found: Finding) -> str:
    names = ("first pass", "zoomed pass")[: len(found.passes)]
    rows = [(title, *(_cell(each, name) for each in found.passes)) for title, name in ROWS]
    return table_html("Rates at which the loss does something", ("", *names), ("", *["number"] * len(names)), rows)


def _cell(each: RangePass, name: str) -> str:
    value = getattr(each.features, name)
    return rate_text(value) if np.isfinite(value) else "-"
