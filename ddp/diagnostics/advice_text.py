"""An `Advice` in words, as a table, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ddp.diagnostics.advise import Advice, Told
from ddp.diagnostics.scaling import PAYS, Projected, Row, StopsPaying
from ddp.diagnostics.step_time import StepCost
from ddp.noise.estimate import Estimate
from ddp.telemetry.progress import epochs_text, number_text
from ddp.telemetry.records import RunInfo

SPLIT_BY = {
    "run": "told apart by the run's own batches",
    "trials": "told apart by the batches that were tried",
    "nothing": "not told apart: micro-batches of one size only, so all of it is taken to go with the examples, which "
    "promises too much of many ranks at a small batch",
}
DEFINITION = (
    f"Paying means: twice the ranks make the run at least {PAYS:g} times as fast, so that the cost to the same "
)
DEFINITION += f"loss rises by no more than {100 * (2 / PAYS - 1):.0f} %."


def text(advice: Advice) -> str:
    """The whole page, without a newline at its end."""
    parts = [headline(advice), noise_text(advice)]
    if advice.scaling is None:
        parts.append("Time and cost cannot be told: fewer than 5 steps of one batch size were timed.")
    else:
        parts += [step_text(advice.scaling.cost), table_text(advice), stops_text(advice)]
    parts += [memory_text(advice), classes_text(advice), assumptions_text(advice)]
    return "\n\n".join(part for part in parts if part)


def headline(advice: Advice) -> str:
    info, last = advice.record.info, advice.record.last
    nodes = f" on {info.nodes} nodes" if info.nodes > 1 else ""
    ranks = f"{info.world_size} rank{'s' if info.world_size > 1 else ''}{nodes}"
    return (
        f"{info.run_id}: {info.task} with {info.optimizer}, {ranks}, {last.global_batch_size:,} examples a step, "
        f"{last.step:,} steps"
    )


def noise_text(advice: Advice) -> str:
    """The sentence of the reading that counts, how old it is, and what the latest one says if that is another."""
    info, latest, used = advice.record.info, advice.record.latest, advice.record.used
    if latest is None:
        return "The noise scale was not measured in this run. Only what the step times tell can be said."
    if used is None:
        return f"{latest.sentence(info)} Only what the step times tell can be said."
    if used.step == latest.step:
        return used.sentence(info)
    return f"{latest.sentence(info)}\n\n{used.sentence(info)} {age_text(advice, used)}"


def age_text(advice: Advice, used: Told) -> str:
    last = advice.record.last
    steps = last.step - used.step
    return (
        f"That is the latest resolved reading, {steps:,} step{'s' if steps > 1 else ''} "
        f"({epochs_text(last.epoch - used.epoch)} epochs) before the end, and what follows rests on it"
        f"{': since a later one says otherwise, it is about the way to that step only' * advice.record.is_refuted}."
    )


def step_text(cost: StepCost) -> str:
    computing = cost.measured_seconds - cost.all_reduce_seconds - cost.step_seconds
    waiting = computing * cost.waiting_share / (1 + cost.waiting_share)
    shares = {
        "computing": computing - waiting,
        "all-reduce": cost.all_reduce_seconds,
        "waiting for slower ranks": waiting,
        "the optimizer and the rest": cost.step_seconds,
    }
    listed = ", ".join(f"{name} {_milliseconds(max(0.0, seconds))}" for name, seconds in shares.items())
    return (
        f"A step of {cost.measured_batch_size:,} examples takes {_milliseconds(cost.measured_seconds)} (median of "
        f"{cost.measured_steps:,}): {listed}. An example "
        f"costs a rank {_milliseconds(cost.example_seconds)}, a micro-batch {_milliseconds(cost.micro_batch_seconds)} "
        f"besides ({SPLIT_BY[cost.split_by]})."
    )


def table_text(advice: Advice) -> str:
    """Both ways side by side; what the noise scale decides only where there is one."""
    assert advice.scaling is not None
    base = advice.scaling.baseline
    head, rows = table(advice)
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *rows)]
    if advice.scaling.noise_scale is not None:
        own = base.global_batch_size / base.world_size
        split = sum(widths[:3]) + 4
        lines.insert(0, f"{f'the batch stays at {base.global_batch_size:,}':>{split}}  | {own:g} examples a rank:")
    taken, alike = f"{advice.record.horizon[0]:,}", f"{base.steps:,.0f}"
    alike = "" if alike == taken else f" (as many examples as {alike} of {base.global_batch_size:,})"
    title = f"To the loss that this run had after {taken} steps{alike}, if the model holds:"
    return "\n".join([title, *lines])


def table(advice: Advice) -> tuple[list[str], list[list[str]]]:
    """Heading and rows."""
    assert advice.scaling is not None
    priced = advice.price_per_rank_hour is not None
    cost = "cost" if priced else "rank-hours"
    head = ["ranks", "time", cost]
    if advice.scaling.noise_scale is not None:
        head += ["| batch", "time", cost, "data efficiency", "learning rate", "| fastest batch"]
    return head, [_cells(row, advice.price_per_rank_hour or 1.0, len(head) > 3) for row in advice.rows]


def _cells(row: Row, price: float, is_noise_known: bool) -> list[str]:
    cells = [f"{row.ranks:,}", *_way(row.same, price)]
    if not is_noise_known:
        return cells
    if row.grown is None:
        cells += ["| -", "-", "-", "-", "-"]
    else:
        assert row.grown.data_efficiency is not None and row.grown.learning_rate_factor is not None
        efficiency = span(row.grown.data_efficiency, lambda share: f"{100 * share:.0f} %")
        rate = span(row.grown.learning_rate_factor, lambda factor: f"x{factor:.2f}")
        cells += [f"| {row.grown.global_batch_size:,}", *_way(row.grown, price), efficiency, rate]
    fastest = span(row.fastest_batch, lambda batch: f"{batch:,.0f}") if row.fastest_batch else "-"
    return [*cells, f"| {fastest}"]


def _way(way: Projected | None, price: float) -> list[str]:
    if way is None:
        return ["-", "-"]
    return [span(way.seconds, seconds_text), span(way.rank_hours, lambda hours: f"{price * hours:.3g}")]


def span(estimate: Estimate, shown: Callable[[float], str]) -> str:
    """The point with its ends; one value where they look alike, and no point where that is as open as an end."""
    low, point, high = shown(estimate.low), shown(estimate.value), shown(estimate.high)
    if low == high:
        return point
    return f"{low}..{high}" if estimate.value in (estimate.low, estimate.high) else f"{point} ({low}..{high})"


def stops_text(advice: Advice) -> str:
    """The sentence this is all for, with what it means."""
    same, grown, scaling = advice.same_stops, advice.grown_stops, advice.scaling
    if same is None or scaling is None:
        return ""
    batch, own = scaling.baseline.global_batch_size, scaling.baseline.global_batch_size / scaling.baseline.world_size
    kept = f"with the global batch kept at {batch:,}, which communication and the fixed cost of a step limit"
    if grown is None:
        return f"More ranks stop paying at {stops_at(same)} {kept}{cost_there(same)}. {DEFINITION}"
    why = f"with {own:g} examples a rank, which the noise scale limits"
    return (
        f"More ranks stop paying at {stops_at(grown)} {why}{cost_there(grown)}; and at {stops_at(same)} {kept}"
        f"{cost_there(same)}. {DEFINITION}"
    )


def stops_at(stops: StopsPaying) -> str:
    """A number of ranks, as a range where the ends of the noise scale differ; "more than" where there was no end."""
    if stops.low is None:
        return f"more than {stops.limit:,} ranks, as many as this way admits,"
    if stops.high is None:
        return f"{stops.low:,} ranks or more ({stops.limit:,} are as many as this way admits)"
    if stops.low == stops.high:
        return f"{stops.low:,} rank{'s' if stops.low > 1 else ''}"
    return f"{stops.ranks:,} rank{'s' if stops.ranks != 1 else ''} ({stops.low:,}-{stops.high:,})"


def cost_there(stops: StopsPaying) -> str:
    """Beside the number of ranks; nothing where that is one."""
    if stops.ranks == 1:
        return ""
    times = span(stops.cost, lambda cost: f"{cost:.2g}")
    return f", where the same loss costs {times} times what it does on one rank"


def memory_text(advice: Advice) -> str:
    if advice.largest is None:
        return advice.not_tried
    micro = advice.record.info.micro_batch_size
    return f"{advice.largest.sentence()} The run holds {micro:,} at once."


def classes_text(advice: Advice) -> str:
    """The rule of thumb beside it, for tasks that tell classes."""
    asked = advice.largest.facts.batch_for_classes() if advice.largest else None
    if advice.largest is None or asked is None:
        return ""
    batch, classes = advice.record.last.global_batch_size, advice.largest.facts.classes
    verdict = "more than that" if batch > asked[1] else "less than that" if batch < asked[0] else "as asked"
    return (
        f"A rule of thumb asks for 2 to 3 examples of each class in a batch: with {classes:,} classes, the rarest "
        f"included, that is {asked[0]:,} to {asked[1]:,}. The run has {batch:,}, {verdict}."
    )


def assumptions_text(advice: Advice) -> str:
    if advice.scaling is None:
        return ""
    optimizer, sampled = advice.optimizer, advice.record.info.sampled
    rule = f"learning rates follow the rule {optimizer.rule}"
    rule += f" with exponent {optimizer.rule_exponent:g}" if optimizer.rule in ("noise_scale", "adascale") else ""
    lines = [
        advice.scaling.communication.basis,
        f"waiting for slower ranks stays at {100 * advice.scaling.cost.waiting_share:.0f} % of computing",
        f"{rule}, as factors on the run's",
        f"the noise scale{f' of {sampled}' * bool(sampled)} stays what it was in that reading; early in a run it is always smaller",
    ]
    return "Assumed:\n" + "\n".join(f"  - {line}" for line in lines)


def to_json(advice: Advice) -> dict[str, Any]:
    """Plain values; null for what is unknown or infinite. Seconds, examples, and rank-hours or their price."""
    record, scaling = advice.record, advice.scaling
    return _finite(
        {
            "run": _run(record.info, advice),
            "latest_reading": _reading(record.latest, advice),
            "reading": _reading(record.used, advice),
            "step": None if scaling is None else asdict(scaling.cost),
            "communication": None if scaling is None else asdict(scaling.communication),
            "ranks": [_row(row, advice.price_per_rank_hour) for row in advice.rows],
            "more_ranks_stop_paying": {
                "definition": DEFINITION,
                "same_batch": None if advice.same_stops is None else asdict(advice.same_stops),
                "grown_batch": None if advice.grown_stops is None else asdict(advice.grown_stops),
            },
            "learning_rate_rule": advice.optimizer.rule,
            "learning_rate_exponent": advice.optimizer.rule_exponent,
            "largest_batch_per_rank": None if advice.largest is None else asdict(advice.largest),
            "batch_for_classes": advice.largest and advice.largest.facts.batch_for_classes(),
            "messages": [part for part in (noise_text(advice), stops_text(advice), memory_text(advice)) if part],
        }
    )


def _run(info: RunInfo, advice: Advice) -> dict[str, Any]:
    last = advice.record.last
    return {
        "run_id": info.run_id,
        "task": info.task,
        "optimizer": info.optimizer,
        "world_size": info.world_size,
        "nodes": info.nodes,
        "global_batch_size": last.global_batch_size,
        "micro_batch_size": info.micro_batch_size,
        "training_examples": info.training_examples or None,
        "sampling": info.sampling,
        "steps": last.step,
        "horizon_steps": advice.record.horizon[0],
        "reading_is_refuted": advice.record.is_refuted,
    }


def _reading(told: Told | None, advice: Advice) -> dict[str, Any] | None:
    if told is None:
        return None
    return {**asdict(told), "steps_old": advice.record.last.step - told.step}


def _row(row: Row, price: float | None) -> dict[str, Any]:
    return {
        "ranks": row.ranks,
        "same_batch": _priced(row.same, price),
        "grown_batch": _priced(row.grown, price),
        "fastest_batch": None if row.fastest_batch is None else asdict(row.fastest_batch),
    }


def _priced(way: Projected | None, price: float | None) -> dict[str, Any] | None:
    if way is None:
        return None
    cost = None if price is None else {end: price * value for end, value in asdict(way.rank_hours).items()}
    return {**asdict(way), "price": cost}


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def seconds_text(seconds: float) -> str:
    """3.2 s, 5.3 min, 12 h, 40 days."""
    for unit, length in (("s", 120.0), ("min", 120.0 * 60), ("h", 72 * 3600.0)):
        if seconds < length:
            return f"{number_text(seconds / {'s': 1, 'min': 60, 'h': 3600}[unit])} {unit}"
    return f"{number_text(seconds / 86400)} days"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
