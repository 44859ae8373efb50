"""The report's tables: readings, changes of the batch size, and what runs have measured. Values in, text out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from ddp.noise.noise_scale import LARGEST_WINDOW, Reading, State
from ddp.noise.readings import Method
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.progress import METRIC_NAMES, moment_text, number_text
from ddp.telemetry.records import BatchChange, EventKind, RunEvent, RunInfo
from ddp.telemetry.report_page import Table
from ddp.telemetry.summary import History

READINGS_SHOWN = 12
EVENTS_SHOWN = 50

STATES_IN_WORDS: dict[State, str] = {
    "unresolved": "too few observations, or too much noise to say anything",
    "beyond_data": "above the training set's size: it is nearly fitted",
    "lower_bound": "only a lower bound is known",
    "wide": "its ends are more than a factor of 4 apart",
    "resolved": "its ends are within a factor of 4",
}
METHODS_IN_WORDS: dict[Method, str] = {
    "ranks": "ranks",
    "micro_batches": "micro-batches",
    "split": "halves",
    "none": "none",
}


EVENTS_IN_WORDS: dict[EventKind, str] = {
    "not_finite": "not finite",
    "rolled_back": "rolled back",
    "straggler": "straggler",
    "straggler_over": "straggler no more",
    "replicas_differ": "replicas differ",
    "saved": "saved",
    "save_failed": "save failed",
    "warning": "warning",
    "stopped_early": "stopped early",
}


def events_table(events: Sequence[RunEvent]) -> Table:
    """What happened, the latest `EVENTS_SHOWN`; saves that went well have a card instead, warnings a table."""
    told = [event for event in events if event.kind not in ("saved", "warning")]
    columns = (("When", "state"), ("Step", "number"), ("What", "state"), ("Rank", "number"), ("", ""))
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event.unix_time)),
            f"{event.step:,}",
            EVENTS_IN_WORDS.get(event.kind, event.kind),
            str(event.rank) if event.rank >= 0 else "–",
            event.text,
        )
        for event in told[-EVENTS_SHOWN:]
    ]
    title = "What happened to the run"
    if len(told) > EVENTS_SHOWN:
        title += f", the latest {EVENTS_SHOWN} of {len(told):,}"
    return Table(title, columns, rows)


def ranks_table(phase_seconds: Sequence[Mapping[str, float]]) -> Table:
    """What each rank did by itself in a step, and what it waited for the others; left out for one rank."""
    own = ("data", "forward", "backward")
    columns = (
        *(("Rank", "number"), ("To its last gradient", "number"), *((name.capitalize(), "number") for name in own)),
        ("Waiting for others", "number"),
    )
    rows = [
        (
            str(rank),
            *(
                f"{1000 * value:.3g}"
                for value in (sum(seconds[name] for name in own), *(seconds[name] for name in own))
            ),
            f"{1000 * seconds['wait']:.3g}",
        )
        for rank, seconds in enumerate(phase_seconds)
    ]
    return Table("Time of each rank in a step, mean in milliseconds", columns, rows if len(rows) > 1 else ())


def readings_table(history: History) -> Table:
    """About a dozen headline readings, evenly spread over the run."""
    kept, last = history.readings, READINGS_SHOWN - 1
    chosen = kept if len(kept) <= last + 1 else [kept[round(i * (len(kept) - 1) / last)] for i in range(last + 1)]
    columns = (
        *(("Step", "number"), ("Epoch", "number"), ("Global batch", "number"), ("Noise scale", "number")),
        *(("95 % interval", "number"), ("Metric", "state"), ("From", "state"), ("State", "state")),
        *(("To resolve", "number"), ("", "words")),
    )
    rows = [
        (
            f"{timed.step:,}",
            f"{timed.epoch:.2f}",
            f"{timed.global_batch_size:,}",
            *_interval_cells(timed.reading),
            METRIC_NAMES[timed.metric],
            METHODS_IN_WORDS[timed.method],
            timed.reading.state.replace("_", " "),
            needed_text(timed.reading) or "–",
            STATES_IN_WORDS[timed.reading.state],
        )
        for timed in chosen
    ]
    return Table("Readings of the noise scale, in examples", columns, rows)


def needed_text(reading: Reading) -> str:
    """How many more observations would resolve it; empty where it is resolved or that is not known."""
    needed = reading.steps_needed
    if reading.state in ("resolved", "beyond_data") or not needed > 0:
        return ""
    return f"over {LARGEST_WINDOW} in all" if needed == math.inf else f"{needed:,.0f} more"


def _interval_cells(reading: Reading) -> tuple[str, str]:
    match reading.state:
        case "unresolved":
            return "–", "–"
        case "lower_bound" | "beyond_data":
            return "–", f"above {number_text(reading.low)}"
        case "resolved" | "wide":
            return number_text(reading.noise_scale), f"{number_text(reading.low)} to {number_text(reading.high)}"


def changes_table(info: RunInfo, changes: list[BatchChange]) -> Table:
    """Every change of the global batch size, with what decided it."""
    columns = (("When", "state"), ("From", "number"), ("To", "number"), ("Learning rate", "number"), ("Why", ""))
    rows = [
        (
            moment_text(info, change.step, change.epoch),
            f"{change.before:,}",
            f"{change.after:,}",
            f"x {change.learning_rate_factor:.3g}",
            change.reason,
        )
        for change in changes
    ]
    return Table("Changes of the global batch size, in examples", columns, rows)


def critical_table(measured: list[CriticalBatch]) -> Table:
    """Critical batch sizes from runs, each with what it belongs to."""
    columns = (
        *(("Method", ""), ("Optimizer", ""), ("Target", "")),
        *(("Critical batch size", "number"), ("95 % interval", "number")),
    )
    rows = [
        (
            *(each.method, each.optimizer, each.target, number_text(each.critical_batch_size)),
            f"{number_text(each.low)} to {number_text(each.high)}",
        )
        for each in measured
    ]
    return Table("Critical batch sizes that runs have measured, in examples", columns, rows)
