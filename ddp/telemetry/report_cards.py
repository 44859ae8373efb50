"""The report's cards: the few numbers that matter, each with what to hold beside it. Values in, text out."""

from __future__ import annotations

from collections.abc import Sequence

from ddp.noise.noise_scale import Reading
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.progress import METRIC_NAMES, OWN_METRIC_UNKNOWN, metric_text, moment_text, number_text, reading_text
from ddp.telemetry.records import EvaluationRecord, RunInfo, StepRecord
from ddp.telemetry.report_page import Card
from ddp.telemetry.report_tables import STATES_IN_WORDS, needed_text
from ddp.telemetry.summary import History, TimedReading, as_of_text

CRITICAL_CARDS = 2


def run_cards(info: RunInfo, history: History, critical_batches: Sequence[CriticalBatch]) -> list[Card]:
    """What the run came to: validation, target, noise scale, batch size, what runs measured, the latest step."""
    cards = [] if history.validation is None else [_validation_card(info, history.validation)]
    if info.target is not None:
        cards.append(_target_card(info, history))
    if history.latest is not None:
        cards += _noise_cards(info, history, history.latest)
    cards.append(Card("Global batch size", f"{history.global_batch_size:,}", _batch_detail(info, history)))
    cards += [_critical_card(each) for each in critical_batches[:CRITICAL_CARDS]]
    if history.last is not None:
        cards.append(_step_card(history.last))
    return cards


def _validation_card(info: RunInfo, record: EvaluationRecord) -> Card:
    value = record.metrics.get(info.metric)
    if value is None:
        return Card("Validation loss", f"{record.loss:.4g}", f"{record.examples:,} examples")
    shown = metric_text(info.metric, value).removeprefix(f"{info.metric} ")
    return Card(f"Validation {info.metric}", shown, f"loss {record.loss:.4g}")


def _target_card(info: RunInfo, history: History) -> Card:
    assert info.target is not None
    goal = metric_text(info.metric, info.target)
    if history.target_reached is None:
        return Card("Target", "not reached", goal)
    then, reached = history.at_target, history.target_reached
    noise = f"{goal}; noise scale then {reading_text(then.reading, then.metric)}" if then else goal
    return Card("Target reached", moment_text(info, reached.step, reached.epoch), noise)


def _noise_cards(info: RunInfo, history: History, latest: TimedReading) -> list[Card]:
    """The headline's, and the plain one beside it where that is another."""
    title = f"Noise scale {as_of_text(info, latest)}{f', {info.sampling} draws' * bool(info.sampled)}"
    if latest.metric == "plain":
        named = f"{title}, plain metric" if info.optimizer in OWN_METRIC_UNKNOWN else title
        return [_noise_card(named, latest.reading)]
    cards = [_noise_card(f"{title}, {METRIC_NAMES[latest.metric]}", latest.reading)]
    if history.last is not None and history.last.noise is not None:
        cards.append(_noise_card("Plain noise scale, latest", history.last.noise.plain))
    return cards


def _noise_card(title: str, reading: Reading) -> Card:
    match reading.state:
        case "resolved" | "wide":
            value = number_text(reading.noise_scale)
            detail = f"[{number_text(reading.low)}, {number_text(reading.high)}] examples, {reading.state}"
        case "lower_bound" | "beyond_data":
            value = f"> {number_text(reading.low)}"
            detail = STATES_IN_WORDS[reading.state]
        case "unresolved":
            value, detail = "unresolved", STATES_IN_WORDS["unresolved"]
    needed = needed_text(reading)
    return Card(title, value, f"{detail}; observations to resolve it: {needed}" if needed else detail)


def _batch_detail(info: RunInfo, history: History) -> str:
    detail = f"examples over {info.world_size} rank{'s' if info.world_size > 1 else ''}"
    if not history.changes:
        return detail
    times = "once" if len(history.changes) == 1 else f"{len(history.changes)} times"
    return f"{detail}; adapted itself {times}, from {history.changes[0].before:,}"


def _critical_card(measured: CriticalBatch) -> Card:
    """Measured by runs: another quantity than the noise scale, under its own name."""
    interval = f"[{number_text(measured.low)}, {number_text(measured.high)}] examples"
    detail = f"{interval}, by {measured.method} with {measured.optimizer} to {measured.target}"
    return Card("Critical batch size, measured", number_text(measured.critical_batch_size), detail)


def _step_card(last: StepRecord) -> Card:
    rate = last.examples / last.duration_seconds if last.duration_seconds > 0 else float("nan")
    return Card("Latest step", f"{1000 * last.duration_seconds:.3g} ms", f"{number_text(rate)} examples/s")
