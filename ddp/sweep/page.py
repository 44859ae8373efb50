"""A sweep as one self-contained HTML page: what won, what to be warned of, and every dimension against what it cost.

Styles and figures are in the page, and its content security policy forbids it to fetch anything, as with a run's report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ddp.sweep import charts
from ddp.sweep.dimensions import shown
from ddp.sweep.findings import ONE_FOLD, Findings, StageFound
from ddp.sweep.findings_text import cells, headings
from ddp.sweep.journal import FILE_NAME
from ddp.sweep.trials import Trial, best_of
from ddp.telemetry.charts import SETTINGS
from ddp.telemetry.page_file import write_page
from ddp.telemetry.progress import duration_text
from ddp.telemetry.report_page import Card, Chart, cards_html, charts_html, document, table_html

MOST_ROWS = 50


def write_sweep_page(found: Findings, path: Path) -> Path:
    """Write the page to `path` and return it. Needs matplotlib.

    Raises:
        UsageError: it cannot be written there.
    """
    return write_page(path, render(found, time.time()))


def render(found: Findings, unix_time: float) -> str:
    """The page's HTML. `unix_time` is now, to be shown."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    ranked_by = f"Ranked by the {found.sweep.section.value} evaluation of a trial. {ONE_FOLD}"
    body = cards_html(_cards(found)) + _warnings(found.warnings) + _best(found)
    body += charts_html(_charts(found)) + _ranked(found) + _stages(found) + _failures(found)
    return document(
        title=f"Sweep {found.sweep.name}", notes=(ranked_by,), body=body, footer=f"Made {made} from {FILE_NAME}."
    )


def _cards(found: Findings) -> list[Card]:
    trials = [trial for each in found.stages for trial in each.trials]
    ended = [trial.result for trial in trials if trial.result is not None]
    counts = {state: sum(each.state == state for each in ended) for state in ("pruned", "diverged", "failed")}
    ranks = found.sweep.section.ranks
    seconds = sum(each.seconds for each in ended if math.isfinite(each.seconds))
    cards: list[Card] = []
    if (best := found.best) is not None and best.result is not None:
        detail = f"{best.stage}/{best.name}, after {best.result.steps:,} steps"
        cards.append(Card(f"Best {found.metric}", f"{best.result.value:.4g}", detail))
        cards.append(Card("Its training value", f"{best.result.training_value:.4g}", "on a sample of the training set"))
    complete = sum(each.state == "complete" for each in ended)
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none ended early"
    cards.append(Card("Trials", f"{complete} of {sum(each.wanted for each in found.stages)}", f"complete; {told}"))
    cards.append(Card("Run time", duration_text(seconds), f"of all trials, {ranks} rank{'s' * (ranks > 1)} each"))
    return cards


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return f"<section><h2>Warnings</h2>{''.join(f'<p>{escape(each)}</p>' for each in warnings)}</section>\n"


def _best(found: Findings) -> str:
    if found.best is None:
        return "<section><h2>Best</h2><p>No trial has come to its end yet.</p></section>\n"
    lines = "\n".join(found.overrides(found.best))
    return f"<section><h2>Best</h2><p>As a job: best.toml. Over the sweep's job it sets:</p><pre>{escape(lines)}</pre></section>\n"


def _charts(found: Findings) -> list[Chart]:
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        drawn = [
            Chart(
                each.key,
                charts.dimension_chart(found, each, wide=False),
                "One point a trial; the best one is ringed, pruned ones are open, with what they had by then.",
                charts.dimension_chart(found, each, wide=True),
            )
            for each in found.sweep.dimensions
        ]
        over_time = [charts.progress_chart(found, wide=wide) for wide in (False, True)]
        caption = "In the order of their beginning; the line is the best so far of its stage."
        drawn.insert(0, Chart("Trial after trial", over_time[0], caption, over_time[1]))
        for each in found.stages:
            if each.importance:
                caption = f"PED-ANOVA over the complete trials of stage {each.stage.name}."
                drawn.append(Chart("Which dimensions matter", charts.importance_chart(each.importance), caption))
        return drawn


def _ranked(found: Findings) -> str:
    names = headings(found)
    kinds = ["number" if name not in ("trial", "ended") else "" for name in names]
    rows = [tuple(cells(found, trial, place)) for place, trial in enumerate(found.compared[:MOST_ROWS], 1)]
    more = len(found.compared) - MOST_ROWS
    return table_html(f"Ranked{f', {more} more in results.json' if more > 0 else ''}", names, kinds, rows)


def _stages(found: Findings) -> str:
    names = ("Stage", "Length", "Trials", "Dimension", "Range", "Best")
    rows = [row for each in found.stages for row in _stage_rows(each)]
    return table_html("Stages", names, ("", "", "number", "", "", "number"), rows)


def _stage_rows(each: StageFound) -> list[tuple[str, ...]]:
    epochs, steps = each.stage.length
    length = f"{epochs:g} epochs" if epochs is not None else f"{steps:,} steps" if steps is not None else "the job's"
    best: Trial | None = best_of(each.trials)
    rows: list[tuple[str, ...]] = []
    for index, dimension in enumerate(each.ranges):
        value = "–" if best is None or dimension.key not in best.values else shown(best.values[dimension.key])
        first = (each.stage.name, length, str(each.wanted)) if index == 0 else ("", "", "")
        rows.append((*first, dimension.key, dimension.text(), value))
    return rows


def _failures(found: Findings) -> str:
    rows = [
        (f"{trial.stage}/{trial.name}", trial.result.state, trial.result.cause)
        for each in found.stages
        for trial in each.trials
        if trial.result is not None and trial.result.state in ("diverged", "failed")
    ]
    return table_html("Diverged and failed", ("Trial", "", "Cause"), ("state", "state", ""), rows[:MOST_ROWS])
