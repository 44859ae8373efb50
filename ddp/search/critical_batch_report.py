"""A critical-batch search as one self-contained HTML page, made from its `sweep.db` alone.

Works while the search goes on. Styles and figures are in the page, and its content security policy forbids it to
fetch anything, as with the report of a run.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from ddp.errors import UsageError
from ddp.search import critical_batch_charts as charts
from ddp.search.findings import BatchRow, Finding, findings
from ddp.search.findings_text import in_words
from ddp.search.segment import SegmentComparison, comparisons
from ddp.search.store import FILE_NAME, read_trials
from ddp.telemetry.charts import SETTINGS, WIDE_INCHES
from ddp.telemetry.page_file import write_page
from ddp.telemetry.progress import number_text
from ddp.telemetry.report_page import Card, Chart, cards_html, charts_html, document, table_html

REPORT = "report.html"
HEADINGS = (
    *("Batch size", "Learning rate", "Steps", "95 % interval", "Examples", "Validation loss", "Metric"),
    *("ms a step", "Seconds", "MiB", "Bbar plain", "Bbar precond.", "Seeds"),
)
COLUMNS = ("number",) * len(HEADINGS)


def write_critical_batch_report(out_dir: Path) -> Path:
    """Write `out_dir`/report.html and return its path.

    Raises:
        UsageError: no trial has finished there, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the report needs matplotlib: pip install -e '.[report]'")
    trials = read_trials(out_dir / FILE_NAME)
    found = findings(trials)
    if not found:
        raise UsageError(f"{out_dir / FILE_NAME}: no trial has finished yet; run `python -m ddp critical-batch` first")
    path = out_dir / REPORT
    return write_page(path, render(found, comparisons(trials), out_dir.resolve().name, time.time()))


def render(found: Sequence[Finding], compared: Sequence[SegmentComparison], name: str, unix_time: float) -> str:
    """The page's HTML. `unix_time` is now, to be shown."""
    groups = [list(group) for _, group in groupby(found, key=lambda each: (each.method, each.origin, each.optimizer))]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    note = (
        "Critical batch sizes measured by runs. Each belongs to its optimizer and its target; the noise scale beside "
        "it is what would have been predicted without these runs."
    )
    body = cards_html(_cards(found)) + _comparisons(compared) + "".join(_group(group) for group in groups)
    return document(title=name, notes=(note,), body=body, footer=f"Made {made} from {FILE_NAME}.")


# --- parts of the page ----------------------------------------------------------------------------------------------


def _cards(found: Sequence[Finding]) -> list[Card]:
    """One a finding, with its critical batch size."""
    cards: list[Card] = []
    for each in found:
        value = each.fit.critical_batch_size
        shown = number_text(value.value) if value else "no value"
        interval = f"95 % interval {number_text(value.low)} to {number_text(value.high)} examples" if value else ""
        detail = interval or each.fit.reason
        method = "" if each.method == "sweep" else f", {each.method}"
        cards.append(Card(f"{each.name}{method}", shown, detail))
    return cards


def _comparisons(compared: Sequence[SegmentComparison]) -> str:
    if not compared:
        return ""
    words = "".join(f"<p>{escape(each.in_words())}</p>" for each in compared)
    return f"<section><h2>Sweep and branches over the same stretch</h2>{words}</section>\n"


def _group(found: Sequence[Finding]) -> str:
    """What one optimizer's runs say: words, figures and tables."""
    words = "".join(f"<p>{escape(in_words(each))}</p>" for each in found)
    title = escape(f"{found[0].optimizer}, {found[0].method}")
    tables = "".join(table_html(each.name, HEADINGS, COLUMNS, [_cells(row) for row in each.rows]) for each in found)
    return f"<section><h2>{title}</h2>{words}</section>\n{charts_html(_charts(found))}{tables}"


def _charts(found: Sequence[Finding]) -> list[Chart]:
    import matplotlib

    if not any(each.rows for each in found):
        return []
    with matplotlib.rc_context(SETTINGS):
        drawn = [
            Chart(
                "Steps to the target",
                charts.steps_chart(found),
                "At each batch size's best learning rate, 95 % intervals over seeds; lines are the fitted hyperbola. "
                "Predictions are of the last target.",
                charts.steps_chart(found, WIDE_INCHES),
            ),
            Chart("Examples to the target", charts.examples_chart(found), "Steps times batch size."),
            Chart(
                "Measured and predicted",
                charts.predictions_chart(found),
                "Lines of measured values are 95 % intervals, of predictions their range over batch sizes.",
            ),
            Chart(
                "Steps against examples",
                charts.trade_off_chart(found),
                "The trade between time and cost where any batch takes one time a step: as many ranks as it needs.",
            ),
            Chart(
                "Time against cost in one process",
                charts.time_chart(found),
                "Seconds of plain training steps to the target. Joined are those that none beats in both.",
            ),
            Chart(
                "Best learning rate",
                charts.learning_rate_chart(found),
                "Open points lie on the edge of what was tried and take no part in the fit.",
            ),
            *_generalisation(found),
        ]
        if found[-1].rows:
            caption = "Of the last target's runs; memory is that of the whole process."
            drawn.append(Chart("A step's time and memory", charts.step_chart(found), caption))
        return drawn


def _generalisation(found: Sequence[Finding]) -> list[Chart]:
    """Validation when the training loss is the same: what a larger batch does to generalisation."""
    values = {
        "Validation loss at the target": lambda row: row.validation_loss,
        "Validation metric at the target": lambda row: row.validation_metric,
    }
    caption = "Mean over seeds with 95 % intervals, at the same training loss for every batch size."
    return [
        Chart(title, charts.validation_chart(found, title, value), caption)
        for title, value in values.items()
        if any(math.isfinite(value(row).value) for each in found for row in each.rows)
    ]


def _cells(row: BatchRow) -> tuple[str, ...]:
    best = row.best
    rate = f"{best.learning_rate:.3g}" + ("" if best.interior else " (edge)")
    return (
        f"{row.batch_size:,}",
        rate,
        number_text(best.steps.value),
        f"{number_text(best.steps.low)} to {number_text(best.steps.high)}",
        number_text(row.examples.value),
        _number(row.validation_loss.value, ".4g"),
        _number(row.validation_metric.value, ".4g"),
        _number(1000 * row.seconds_per_step, ".3g"),
        _number(row.seconds, ".3g"),
        f"{row.peak_memory_bytes / 2**20:,.0f}",
        _number(row.noise_plain, ",.0f"),
        _number(row.noise_preconditioned, ",.0f"),
        str(best.seeds),
    )


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"
