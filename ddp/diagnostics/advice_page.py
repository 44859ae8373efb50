"""An `Advice` as one self-contained HTML page: the sentences, time and cost over ranks, and the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ddp.diagnostics import advice_text
from ddp.diagnostics.advise import Advice, default_ranks
from ddp.diagnostics.scaling import Row, Scaling
from ddp.noise.estimate import Estimate
from ddp.telemetry.charts import PALETTE, SETTINGS, Drawing, Key, finished_drawing, log_axis, new_figure
from ddp.telemetry.page_file import write_page
from ddp.telemetry.progress import number_text
from ddp.telemetry.report_page import Card, Chart, cards_html, charts_html, document, table_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quantity = Literal["seconds", "rank_hours"]


def write_advice_page(advice: Advice, path: Path) -> Path:
    """Write the page to `path` and return it. Needs matplotlib.

    Raises:
        UsageError: it cannot be written there.
    """
    return write_page(path, render(advice, time.time()))


def render(advice: Advice, unix_time: float) -> str:
    """The page's HTML. `unix_time` is now, to be shown."""
    notes = [
        advice_text.headline(advice),
        *advice_text.noise_text(advice).split("\n\n"),
        advice_text.stops_text(advice),
        advice_text.memory_text(advice),
        advice_text.classes_text(advice),
    ]
    body = cards_html(_cards(advice))
    if advice.scaling is not None:
        body += charts_html(_charts(advice.scaling, advice)) + _table(advice)
    assumed = advice_text.assumptions_text(advice).replace("\n  - ", "; ").replace("Assumed:;", "Assumed:")
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    return document(
        title=f"More ranks for {advice.record.info.run_id}?",
        notes=[note for note in notes if note],
        body=body,
        footer=f"{assumed}{'. ' if assumed else ''}Made {made} from run.db.",
    )


def _cards(advice: Advice) -> list[Card]:
    cards: list[Card] = []
    if advice.grown_stops is not None:
        value = advice_text.stops_at(advice.grown_stops)
        cards.append(Card("More ranks stop paying at", value, "where the batch grows with them"))
    if advice.same_stops is not None:
        batch = advice.record.last.global_batch_size
        cards.append(
            Card("More ranks stop paying at", advice_text.stops_at(advice.same_stops), f"where it stays {batch:,}")
        )
    if advice.record.used is not None:
        reading = advice.record.used.reading
        low, high = number_text(reading.low), number_text(reading.high)
        point = f"> {low}" if reading.state == "lower_bound" else number_text(reading.noise_scale)
        cards.append(Card("Noise scale", point, f"[{low}, {high}] examples, {reading.state.replace('_', ' ')}"))
    if advice.largest is not None and advice.largest.examples:
        least = "" if advice.largest.ended_by == "memory" else "at least "
        cards.append(Card("Largest batch per rank", f"{least}{advice.largest.examples:,}", "that fits its memory"))
    return cards


def _charts(scaling: Scaling, advice: Advice) -> list[Chart]:
    import matplotlib

    most = max([row.ranks for row in advice.rows], default=1)
    rows = scaling.rows([ranks for ranks in default_ranks(max(1, most // 4)) if ranks <= most])
    priced = advice.price_per_rank_hour is not None
    price = advice.price_per_rank_hour or 1.0
    with matplotlib.rc_context(SETTINGS):
        charts = [
            Chart("Time to the same loss", _time(scaling, rows), "Seconds, both axes logarithmic. The dot is the run."),
            Chart(
                "Cost of the same loss",
                _cost(scaling, rows, price),
                "In money." if priced else "In rank-hours: ranks times time.",
            ),
        ]
        if scaling.noise_scale is not None:
            caption = "Examples that a tiny batch would need, over those that this one does, if the model holds."
            charts.append(Chart("Data efficiency of a batch that grows", _efficiency(rows), caption))
            caption = "The global batch that takes least time: sqrt(B a / c) where a step of b examples takes a + c b."
            charts.append(Chart("The fastest batch", _fastest(rows), caption))
    return charts


def _time(scaling: Scaling, rows: Sequence[Row]) -> Drawing:
    figure, axes = new_figure()
    keys = _both_ways(axes, scaling, rows, "seconds", 1.0)
    base = scaling.baseline
    axes.plot(
        base.world_size,
        base.steps * scaling.cost.seconds(base.world_size, base.global_batch_size, scaling.communication),
        "o",
        color=PALETTE["ink"],
        markersize=5,
    )
    _axes_of_ranks(axes, rows)
    log_axis(axes)
    return finished_drawing(figure, axes, "time to the same loss over ranks", keys, x_label="ranks")


def _cost(scaling: Scaling, rows: Sequence[Row], price: float) -> Drawing:
    figure, axes = new_figure()
    keys = _both_ways(axes, scaling, rows, "rank_hours", price)
    _axes_of_ranks(axes, rows)
    log_axis(axes)
    return finished_drawing(figure, axes, "cost of the same loss over ranks", keys, x_label="ranks")


def _efficiency(rows: Sequence[Row]) -> Drawing:
    figure, axes = new_figure()
    known = [(row.ranks, row.grown.data_efficiency) for row in rows if row.grown and row.grown.data_efficiency]
    _line(axes, known, 100.0, "blue")
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    _axes_of_ranks(axes, rows)
    return finished_drawing(figure, axes, "data efficiency over ranks", [], x_label="ranks")


def _fastest(rows: Sequence[Row]) -> Drawing:
    figure, axes = new_figure()
    _line(axes, [(row.ranks, row.fastest_batch) for row in rows if row.fastest_batch], 1.0, "green")
    _axes_of_ranks(axes, rows)
    log_axis(axes)
    return finished_drawing(figure, axes, "fastest global batch over ranks", [], x_label="ranks")


def _both_ways(axes: Axes, scaling: Scaling, rows: Sequence[Row], quantity: Quantity, factor: float) -> list[Key]:
    base = scaling.baseline
    keys: list[Key] = []
    if grown := [(row.ranks, getattr(row.grown, quantity)) for row in rows if row.grown]:
        _line(axes, grown, factor, "blue")
        keys.append(Key(f"{base.global_batch_size / base.world_size:g} examples a rank", "blue"))
    if same := [(row.ranks, getattr(row.same, quantity)) for row in rows if row.same]:
        _line(axes, same, factor, "orange")
        keys.append(Key(f"the batch stays at {base.global_batch_size:,}", "orange"))
    return keys


def _line(axes: Axes, points: Sequence[tuple[int, Estimate]], factor: float, colour: str) -> None:
    """Points over ranks, with the band between their ends."""
    ranks = [each for each, _ in points]
    low, point, high = (
        factor * np.array([getattr(estimate, end) for _, estimate in points]) for end in ("low", "value", "high")
    )
    axes.fill_between(ranks, low, high, color=PALETTE[colour], alpha=0.18, linewidth=0)
    axes.plot(ranks, point, color=PALETTE[colour], marker="o", markersize=3.2)


def _axes_of_ranks(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    ranks = [row.ranks for row in rows]
    shown = [each for each in ranks if each & (each - 1) == 0]
    shown = shown[:: -(-len(shown) // 9)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{each:,}" for each in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _table(advice: Advice) -> str:
    head, rows = advice_text.table(advice)
    plain = [tuple(cell.removeprefix("| ") for cell in row) for row in rows]
    names = [name.removeprefix("| ") for name in head]
    if len(names) > 3:
        names[1:3] = [f"{name}, same batch" for name in names[1:3]]
        names[3:6] = [f"{name}, batch grows" if name != "batch" else "growing batch" for name in names[3:6]]
    return table_html(
        f"To the loss that this run had after {advice.record.horizon[0]:,} steps", names, ["number"] * len(names), plain
    )
