"""Reads `run.db` back: the records as the trainer handed them in. `schema` has its tables.

The layers' readings are read apart (`read_parts_over_time`), which keeps reading the steps cheap.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import get_args

from ddp.noise.noise_scale import Reading, State
from ddp.noise.readings import Method, Metric, NoiseReadings, PartReading
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.record_values import number, one_of, run_info, whole
from ddp.telemetry.recording_file import open_recording as open_recording
from ddp.telemetry.records import PHASES, BatchChange, EvaluationRecord, RunEvent, RunInfo, Sink, StepRecord
from ddp.telemetry.schema import FIRST_PART_PLACE, PLAIN_PLACE, PRECONDITIONED_PLACE, READING_COLUMNS

STATES: tuple[State, ...] = get_args(State)
METRICS: tuple[Metric, ...] = get_args(Metric)
METHODS: tuple[Method, ...] = get_args(Method)
Held = dict[Metric, tuple[int, Reading]]
TIMED_TABLES = ("steps", "evaluations", "events")


@dataclass(frozen=True, slots=True)
class PartsMoment:
    """The layers and groups after one step, in the model's order."""

    step: int
    epoch: float
    parts: tuple[PartReading, ...]


def read_parts(database: sqlite3.Connection) -> list[RunInfo]:
    """What each process of the run said about itself, the first one first."""
    names = [field.name for field in fields(RunInfo)]
    rows = database.execute(f"SELECT {', '.join(names)} FROM run ORDER BY part")
    return [run_info(row) for row in rows]


def count_steps(database: sqlite3.Connection) -> int:
    (count,) = database.execute("SELECT count(*) FROM steps").fetchone()
    return count


def read_steps(database: sqlite3.Connection, every: int = 1) -> Iterator[StepRecord]:
    """Every `every`-th step in order, and always the last one. `noise.parts` stays empty.

    A reading that nothing moved is the same object from step to step, as it was when it was recorded.
    """
    chosen = "{0}.step % :every = 0 OR {0}.step = (SELECT max(step) FROM steps)"
    columns = ", ".join(f"{phase}_seconds" for phase in PHASES)
    phases = database.execute(
        f"SELECT step, {columns} FROM phases WHERE {chosen.format('phases')} ORDER BY step, rank", {"every": every}
    )
    pending = next(phases, None)
    held: Held = {}
    steps = f"{STEPS_WITH_READINGS} WHERE {chosen.format('steps')} ORDER BY steps.step"
    for row in database.execute(steps, {"every": every}):
        ranks: list[Mapping[str, float]] = []
        while pending is not None and pending["step"] <= row["step"]:
            ranks.append({phase: number(pending[f"{phase}_seconds"]) for phase in PHASES})
            pending = next(phases, None)
        yield _step(row, tuple(ranks), held)


def read_parts_over_time(database: sqlite3.Connection, most: int | None = None) -> list[PartsMoment]:
    """The readings of layers and groups in order of steps.

    Args:
        most: of more moments than this so many are read, evenly spread, the last one among them.
    """
    rows = database.execute("SELECT step FROM readings WHERE place = ? ORDER BY step DESC", (FIRST_PART_PLACE,))
    steps = [step for (step,) in rows]
    if most is not None and len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / max(most - 1, 1))] for i in range(most)]
    return [_parts_moment(database, step) for step in reversed(steps)]


def _parts_moment(database: sqlite3.Connection, step: int) -> PartsMoment:
    query = "SELECT * FROM readings WHERE step = ? AND place >= ? ORDER BY place"
    rows = database.execute(query, (step, FIRST_PART_PLACE)).fetchall()
    (epoch,) = database.execute("SELECT epoch FROM steps WHERE step = ?", (step,)).fetchone()
    parts = tuple(PartReading(row["part"], row["name"], one_of(METRICS, row["metric"]), _reading(row)) for row in rows)
    return PartsMoment(step, number(epoch), parts)


def read_batch_changes(database: sqlite3.Connection) -> list[BatchChange]:
    """All changes of the global batch size, in order."""
    return [
        BatchChange(
            step=whole(row["step"]),
            epoch=number(row["epoch"]),
            unix_time=number(row["unix_time"]),
            before=whole(row["before"]),
            after=whole(row["after"]),
            learning_rate_factor=number(row["learning_rate_factor"]),
            reason=row["reason"],
        )
        for row in database.execute("SELECT * FROM batch_changes ORDER BY step")
    ]


def read_events(database: sqlite3.Connection) -> list[RunEvent]:
    """All that happened, in the order in which it was told; steps may go back, see `RunEvent`."""
    return [
        RunEvent(
            step=whole(row["step"]),
            unix_time=number(row["unix_time"]),
            kind=row["kind"],
            rank=whole(row["rank"]),
            text=row["text"],
            duration_seconds=number(row["duration_seconds"]),
            stall_seconds=number(row["stall_seconds"]),
        )
        for row in database.execute("SELECT * FROM events ORDER BY id")
    ]


def read_methods(database: sqlite3.Connection) -> set[Method]:
    """How the run's steps were observed; `none` for those that were not."""
    rows = database.execute("SELECT DISTINCT method FROM steps WHERE method IS NOT NULL")
    return {method for (method,) in rows}


def read_critical_batches(database: sqlite3.Connection) -> list[CriticalBatch]:
    """What the job file's result of runs said."""
    words, numbers = ("method", "optimizer", "target"), ("critical_batch_size", "low", "high")
    rows = database.execute(f"SELECT {', '.join((*words, *numbers))} FROM critical_batches ORDER BY rowid")
    return [CriticalBatch(*(row[name] for name in words), *(number(row[name]) for name in numbers)) for row in rows]


def read_evaluations(database: sqlite3.Connection) -> list[EvaluationRecord]:
    metrics: dict[tuple[int, str], dict[str, float]] = {}
    for step, split, name, value in database.execute("SELECT step, split, name, value FROM evaluation_metrics"):
        metrics.setdefault((step, split), {})[name] = number(value)
    return [
        EvaluationRecord(
            step=whole(row["step"]),
            epoch=number(row["epoch"]),
            unix_time=number(row["unix_time"]),
            split=row["split"],
            examples=whole(row["examples"]),
            loss=number(row["loss"]),
            metrics=metrics.get((row["step"], row["split"]), {}),
            penalty=number(row["penalty"]),
        )
        for row in database.execute("SELECT * FROM evaluations ORDER BY step, split")
    ]


def replay(
    steps: Iterable[StepRecord],
    evaluations: Iterable[EvaluationRecord],
    changes: Iterable[BatchChange],
    sink: Sink,
) -> None:
    """Hand records to a sink in the order in which they came; all inputs are in order."""
    for record in heapq.merge(steps, evaluations, changes, key=lambda each: each.step):
        match record:
            case StepRecord():
                sink.step(record)
            case EvaluationRecord():
                sink.evaluation(record)
            case BatchChange():
                sink.batch_change(record)


def read_times(database: sqlite3.Connection, until_step: int | None = None) -> tuple[float, float, float] | None:
    """Unix time of the run's first beginning and of the latest record, and the seconds of all steps; None before a part.

    Args:
        until_step: steps after this one do not count.
    """
    (began,) = database.execute("SELECT min(started_unix_time) FROM run").fetchone()
    if began is None:
        return None
    counted = -1 if until_step is None else until_step
    (seconds,) = database.execute(
        "SELECT total(duration_seconds) FROM steps WHERE step <= :step OR :step < 0", {"step": counted}
    ).fetchone()
    latest = [database.execute(f"SELECT max(unix_time) FROM {table}").fetchone()[0] for table in TIMED_TABLES]
    times = [number(each) for each in (began, *latest) if each is not None]
    return times[0], max(times), seconds


def mean_phase_seconds(database: sqlite3.Connection) -> list[dict[str, float]]:
    """Mean time of each phase over all steps, one mapping a rank."""
    means = ", ".join(f"avg({phase}_seconds) AS {phase}" for phase in PHASES)
    rows = database.execute(f"SELECT {means} FROM phases GROUP BY rank ORDER BY rank")
    return [{phase: number(row[phase]) for phase in PHASES} for row in rows]


def _step(row: sqlite3.Row, phase_seconds: tuple[Mapping[str, float], ...], held: Held) -> StepRecord:
    return StepRecord(
        step=whole(row["step"]),
        epoch=number(row["epoch"]),
        unix_time=number(row["unix_time"]),
        examples=whole(row["examples"]),
        examples_total=whole(row["examples_total"]),
        loss=number(row["loss"]),
        learning_rate=number(row["learning_rate"]),
        gradient_norm=number(row["gradient_norm"]),
        duration_seconds=number(row["duration_seconds"]),
        phase_seconds=phase_seconds,
        all_reduce_bytes=whole(row["all_reduce_bytes"]),
        straggler_rank=whole(row["straggler_rank"]),
        global_batch_size=whole(row["global_batch_size"]),
        noise=_noise(row, held),
        slowdown_ratio=number(row["slowdown_ratio"]),
        metric=number(row["metric"]),
        momentum=number(row["momentum"]),
        cpu_seconds=number(row["cpu_seconds"]),
    )


def _noise(row: sqlite3.Row, held: Held) -> NoiseReadings | None:
    plain = _held_reading(row, "plain", held)
    if plain is None:
        return None
    return NoiseReadings(
        plain=plain,
        preconditioned=_held_reading(row, "preconditioned", held),
        headline=one_of(METRICS, row["headline"]),
        method=one_of(METHODS, row["method"]),
        sampled_every=whole(row["sampled_every"]),
    )


def _held_reading(row: sqlite3.Row, metric: Metric, held: Held) -> Reading | None:
    """The reading that holds after the row's step; `held` has the latest of each metric by its step."""
    step = row[f"{metric}_step"]
    if step is None:
        return None
    if metric not in held or held[metric][0] != step:
        held[metric] = (step, _reading(row, f"{metric}_"))
    return held[metric][1]


def _reading(row: sqlite3.Row, prefix: str = "") -> Reading:
    return Reading(
        state=one_of(STATES, row[f"{prefix}state"]),
        noise_scale=number(row[f"{prefix}noise_scale"]),
        low=number(row[f"{prefix}low"]),
        high=number(row[f"{prefix}high"]),
        squared_norm=number(row[f"{prefix}squared_norm"]),
        variance_trace=number(row[f"{prefix}variance_trace"]),
        observations=whole(row[f"{prefix}observations"]),
        window=whole(row[f"{prefix}window"]),
        steps_needed=number(row[f"{prefix}steps_needed"]),
        drifting=bool(row[f"{prefix}drifting"]),
    )


def _steps_with_readings() -> str:
    """Each step beside the two readings that hold after it."""
    joined = {"plain": PLAIN_PLACE, "preconditioned": PRECONDITIONED_PLACE}
    columns = ", ".join(f"{name}.{column} AS {name}_{column}" for name in joined for column in READING_COLUMNS)
    joins = " ".join(
        f"LEFT JOIN readings AS {name} ON {name}.step = steps.{name}_step AND {name}.place = {place}"
        for name, place in joined.items()
    )
    return f"SELECT steps.*, {columns} FROM steps {joins}"


STEPS_WITH_READINGS = _steps_with_readings()
