"""Warnings at the end of a run: in the summary, and as a table of the report. Events in, text out."""

from __future__ import annotations

from collections.abc import Iterable

from ddp.telemetry.records import RunEvent
from ddp.telemetry.report_page import Table
from ddp.watching.finding import title_of

SHOWN = 8  # in the summary


def warnings_of(events: Iterable[RunEvent]) -> list[RunEvent]:
    """Each warning once, in the order in which they were given."""
    first: dict[str, RunEvent] = {}
    for event in events:
        if event.kind == "warning":
            first.setdefault(title_of(event.text), event)
    return list(first.values())


def warning_rows(events: Iterable[RunEvent]) -> list[tuple[str, str]]:
    """Lines of the summary."""
    warnings = warnings_of(events)
    rows = [("warning", f"step {event.step:,}: {event.text}") for event in warnings[:SHOWN]]
    if len(warnings) > SHOWN:
        rows.append(("warning", f"and {len(warnings) - SHOWN} more: see the report"))
    return rows


def warnings_table(events: Iterable[RunEvent]) -> Table:
    columns = (("Step", "number"), ("What looks wrong", ""), ("", ""))
    rows: list[tuple[str, ...]] = []
    for event in warnings_of(events):
        title = title_of(event.text)
        rows.append((f"{event.step:,}", title[:1].upper() + title[1:], event.text[len(title) :].lstrip(": ")))
    return Table("Warnings", columns, rows)
