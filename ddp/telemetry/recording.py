"""The schema of `run.db` and how to read it back: the records as the trainer handed them in.

SQLite has no NaN: it stores NULL instead (infinities it keeps). So NULL in a measured column means NaN,
and what is absent is told by a column that is never measured: `state` is NULL where the noise scale is off.
`part` counts the processes that continued one run; the steps of an interrupted part that a resume did not
start from are replaced by its own.
"""

from __future__ import annotations

import heapq
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from ddp.errors import UsageError
from ddp.noise.noise_scale import Reading
from ddp.noise.readings import NoiseReadings
from ddp.telemetry.records import PHASES, EvaluationRecord, RunInfo, Sink, StepRecord

SCHEMA_VERSION = 2

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS run (
    part INTEGER PRIMARY KEY, started_unix_time REAL NOT NULL,
    run_id TEXT NOT NULL, task TEXT NOT NULL, optimizer TEXT NOT NULL, transport TEXT NOT NULL,
    version TEXT NOT NULL, world_size INTEGER NOT NULL, global_batch_size INTEGER NOT NULL,
    micro_batch_size INTEGER NOT NULL, training_examples INTEGER NOT NULL, validation_examples INTEGER NOT NULL, steps INTEGER NOT NULL,
    steps_per_epoch INTEGER NOT NULL, epochs REAL NOT NULL, metric TEXT NOT NULL, target REAL, start_step INTEGER NOT NULL,
    restarts INTEGER NOT NULL, goal TEXT NOT NULL, nodes INTEGER NOT NULL,
    gradient_bytes INTEGER NOT NULL, learning_rate_rule TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY, part INTEGER NOT NULL, epoch REAL, unix_time REAL, examples INTEGER NOT NULL,
    examples_total INTEGER NOT NULL, loss REAL, learning_rate REAL, gradient_norm REAL, duration_seconds REAL,
    all_reduce_bytes INTEGER NOT NULL, straggler_rank INTEGER NOT NULL,
    global_batch_size INTEGER NOT NULL,
    state TEXT, noise_scale REAL, low REAL, high REAL, squared_norm REAL, variance_trace REAL,
    observations INTEGER, window INTEGER, steps_needed REAL, drifting INTEGER);
CREATE TABLE IF NOT EXISTS phases (
    step INTEGER NOT NULL, rank INTEGER NOT NULL, {", ".join(f"{phase}_seconds REAL" for phase in PHASES)},
    PRIMARY KEY (step, rank)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluations (
    step INTEGER NOT NULL, split TEXT NOT NULL, part INTEGER NOT NULL, epoch REAL, unix_time REAL,
    examples INTEGER NOT NULL, loss REAL, PRIMARY KEY (step, split)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluation_metrics (
    step INTEGER NOT NULL, split TEXT NOT NULL, name TEXT NOT NULL, value REAL,
    PRIMARY KEY (step, split, name)) WITHOUT ROWID;
"""
STEP_TABLES = ("steps", "phases", "evaluations", "evaluation_metrics")

Row = tuple[Any, ...]


def create_schema(database: sqlite3.Connection) -> None:
    """Make the tables where they are missing.

    Raises:
        sqlite3.DatabaseError: the file is of another version of the schema, or no database.
    """
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        raise sqlite3.DatabaseError(f"its schema is version {version}, this program writes {SCHEMA_VERSION}")
    database.executescript(SCHEMA)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def begin_part(database: sqlite3.Connection, info: RunInfo, unix_time: float) -> int:
    """Add this process to the run, forget the steps that it will take again, and return its part's number."""
    for table in STEP_TABLES:
        database.execute(f"DELETE FROM {table} WHERE step > ?", (info.start_step,))
    (part,) = database.execute("SELECT coalesce(max(part), 0) + 1 FROM run").fetchone()
    names = [field.name for field in fields(RunInfo)]
    _insert(database, "run", ("part", "started_unix_time", *names), (part, unix_time, *astuple(info)))
    return part


def insert_step(database: sqlite3.Connection, part: int, record: StepRecord) -> None:
    names = [field.name for field in fields(StepRecord) if field.name not in ("phase_seconds", "noise")]
    row: Row = tuple(getattr(record, name) for name in names)
    if record.reading is not None:
        names += [field.name for field in fields(Reading)]
        row += astuple(record.reading)
    _insert(database, "steps", (*names, "part"), (*row, part))
    columns = ("step", "rank", *(f"{phase}_seconds" for phase in PHASES))
    for rank, seconds in enumerate(record.phase_seconds):
        _insert(database, "phases", columns, (record.step, rank, *(seconds.get(phase, math.nan) for phase in PHASES)))


def insert_evaluation(database: sqlite3.Connection, part: int, record: EvaluationRecord) -> None:
    names = [field.name for field in fields(EvaluationRecord) if field.name != "metrics"]
    _insert(database, "evaluations", (*names, "part"), (*(getattr(record, name) for name in names), part))
    for name, value in record.metrics.items():
        columns = ("step", "split", "name", "value")
        _insert(database, "evaluation_metrics", columns, (record.step, record.split, name, value))


def open_recording(path: Path) -> sqlite3.Connection:
    """Open a `run.db` for reading, also while the run still writes to it.

    Raises:
        UsageError: there is none, or it is not one of ours.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no record of a run here; name the directory of a run, for example runs/<run id>")
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)
        database.row_factory = sqlite3.Row
        (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise UsageError(f"{path}: cannot read the record of the run: {error}") from None
    if version != SCHEMA_VERSION:
        database.close()
        found = f"version {version}" if version else "an empty file or another program's database"
        raise UsageError(f"{path}: not a record that this program reads (version {SCHEMA_VERSION}): {found}")
    return database


def read_parts(database: sqlite3.Connection) -> list[RunInfo]:
    """What each process of the run said about itself, the first one first."""
    names = [field.name for field in fields(RunInfo)]
    rows = database.execute(f"SELECT {', '.join(names)} FROM run ORDER BY part")
    return [RunInfo(**dict(row)) for row in rows]


def count_steps(database: sqlite3.Connection) -> int:
    (count,) = database.execute("SELECT count(*) FROM steps").fetchone()
    return count


def read_steps(database: sqlite3.Connection, every: int = 1) -> Iterator[StepRecord]:
    """Every `every`-th step in order, and always the last one."""
    condition = "step % :every = 0 OR step = (SELECT max(step) FROM steps)"
    columns = ", ".join(f"{phase}_seconds" for phase in PHASES)
    phases = database.execute(
        f"SELECT step, {columns} FROM phases WHERE {condition} ORDER BY step, rank", {"every": every}
    )
    pending = next(phases, None)
    for row in database.execute(f"SELECT * FROM steps WHERE {condition} ORDER BY step", {"every": every}):
        ranks: list[Mapping[str, float]] = []
        while pending is not None and pending["step"] <= row["step"]:
            ranks.append({phase: _float(pending[f"{phase}_seconds"]) for phase in PHASES})
            pending = next(phases, None)
        yield _step(row, tuple(ranks))


def read_evaluations(database: sqlite3.Connection) -> list[EvaluationRecord]:
    metrics: dict[tuple[int, str], dict[str, float]] = {}
    for step, split, name, value in database.execute("SELECT step, split, name, value FROM evaluation_metrics"):
        metrics.setdefault((step, split), {})[name] = _float(value)
    return [
        EvaluationRecord(
            step=row["step"],
            epoch=_float(row["epoch"]),
            unix_time=_float(row["unix_time"]),
            split=row["split"],
            examples=row["examples"],
            loss=_float(row["loss"]),
            metrics=metrics.get((row["step"], row["split"]), {}),
        )
        for row in database.execute("SELECT * FROM evaluations ORDER BY step, split")
    ]


def replay(steps: Iterable[StepRecord], evaluations: Iterable[EvaluationRecord], sink: Sink) -> None:
    """Hand records to a sink in the order in which they came; both inputs are in order."""
    for record in heapq.merge(steps, evaluations, key=lambda each: each.step):
        if isinstance(record, StepRecord):
            sink.step(record)
        else:
            sink.evaluation(record)


def mean_phase_seconds(database: sqlite3.Connection) -> list[dict[str, float]]:
    """Mean time of each phase over all steps, one mapping a rank."""
    means = ", ".join(f"avg({phase}_seconds) AS {phase}" for phase in PHASES)
    rows = database.execute(f"SELECT {means} FROM phases GROUP BY rank ORDER BY rank")
    return [{phase: _float(row[phase]) for phase in PHASES} for row in rows]


def _step(row: sqlite3.Row, phase_seconds: tuple[Mapping[str, float], ...]) -> StepRecord:
    return StepRecord(
        step=row["step"],
        epoch=_float(row["epoch"]),
        unix_time=_float(row["unix_time"]),
        examples=row["examples"],
        examples_total=row["examples_total"],
        loss=_float(row["loss"]),
        learning_rate=_float(row["learning_rate"]),
        gradient_norm=_float(row["gradient_norm"]),
        duration_seconds=_float(row["duration_seconds"]),
        phase_seconds=phase_seconds,
        all_reduce_bytes=row["all_reduce_bytes"],
        straggler_rank=row["straggler_rank"],
        global_batch_size=row["global_batch_size"],
        noise=None if row["state"] is None else NoiseReadings(plain=_reading(row)),
    )


def _reading(row: sqlite3.Row) -> Reading:
    return Reading(
        state=row["state"],
        noise_scale=_float(row["noise_scale"]),
        low=_float(row["low"]),
        high=_float(row["high"]),
        squared_norm=_float(row["squared_norm"]),
        variance_trace=_float(row["variance_trace"]),
        observations=row["observations"],
        window=row["window"],
        steps_needed=_float(row["steps_needed"]),
        drifting=bool(row["drifting"]),
    )


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _insert(database: sqlite3.Connection, table: str, names: tuple[str, ...], row: Row) -> None:
    marks = ", ".join("?" * len(row))
    database.execute(f"INSERT OR REPLACE INTO {table} ({', '.join(names)}) VALUES ({marks})", row)
