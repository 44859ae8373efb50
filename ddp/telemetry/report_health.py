"""The report's cards on how the run got on: time that counted, a straggler, saves. Values in, text out."""

from __future__ import annotations

from collections.abc import Sequence

from ddp.telemetry.goodput import ratio
from ddp.telemetry.progress import duration_text
from ddp.telemetry.records import RunEvent, RunInfo, StepRecord
from ddp.telemetry.report_page import Card
from ddp.telemetry.warning_text import warnings_of
from ddp.watching.finding import title_of


def health_cards(
    parts: Sequence[RunInfo],
    last: StepRecord | None,
    events: Sequence[RunEvent],
    times: tuple[float, float, float] | None,
) -> list[Card]:
    """What there is to say.

    Args:
        times: when the run began and the latest record was made, and the seconds of all steps.
    """
    cards = _warnings_card(events)
    if times is not None and last is not None:
        cards.append(_goodput_card(parts, events, *times))
    if last is not None and parts[-1].world_size > 1:
        cards.append(_straggler_card(last, events))
    return cards + _saves_card(events)


def _warnings_card(events: Sequence[RunEvent]) -> list[Card]:
    """Their table stands below the charts, where nobody looks without a reason."""
    said = warnings_of(events)
    if not said:
        return []
    return [Card("Warnings", f"{len(said):,}", f"the latest: {title_of(said[-1].text)}; all are below")]


def _goodput_card(
    parts: Sequence[RunInfo], events: Sequence[RunEvent], began: float, latest: float, productive_seconds: float
) -> Card:
    detail = [f"of {duration_text(latest - began)} went into steps that count"]
    if len(parts) > 1:
        detail.append(f"interrupted {_times(len(parts) - 1)}")
    if rolled_back := sum(event.kind == "rolled_back" for event in events):
        detail.append(f"rolled back {_times(rolled_back)}")
    return Card("Goodput", f"{100 * ratio(productive_seconds, latest - began):.1f} %", "; ".join(detail))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _straggler_card(last: StepRecord, events: Sequence[RunEvent]) -> Card:
    named = [event for event in events if event.kind == "straggler"]
    if last.straggler_rank < 0:
        return Card("Straggler", "none", f"named {_times(len(named))} before" if named else "no rank is slow by itself")
    text = next((event.text for event in reversed(named) if event.rank == last.straggler_rank), "")
    return Card("Straggler", f"rank {last.straggler_rank}", text)


def _saves_card(events: Sequence[RunEvent]) -> list[Card]:
    saved = [event for event in events if event.kind == "saved"]
    failed = [event for event in events if event.kind == "save_failed"]
    if not saved and not failed:
        return []
    times = sorted(event.duration_seconds for event in saved if event.duration_seconds >= 0)
    detail = [f"the newest of step {saved[-1].step:,}"] if saved else []
    detail += [f"{times[len(times) // 2]:.2g} s each"] if times else []
    detail += [f"{len(failed)} failed"] if failed else []
    return [Card("Checkpoints saved", f"{len(saved):,}", "; ".join(detail))]
