"""Writes one part of a run to `run.db`. One thread's: `recorder` has that thread, `recording` reads back."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from ddp.noise.noise_scale import Reading
from ddp.noise.readings import Metric, NoiseReadings
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.layer_record import write_layers
from ddp.telemetry.records import (
    PHASES,
    BatchChange,
    EvaluationRecord,
    LayersRecord,
    ParameterEntries,
    ParametersRecord,
    RunEvent,
    RunInfo,
    StepRecord,
)
from ddp.telemetry.schema import (
    FIRST_PART_PLACE,
    PLAIN_PLACE,
    PRECONDITIONED_PLACE,
    READING_COLUMNS,
    STEP_TABLES,
    WHOLE_MODEL,
    create_schema,
)

PARTS_SPACING = 200  # part readings are kept at most this share of the run's steps apart: 1/200
LOCAL_FILESYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "reiserfs", "tmpfs", "ramfs", "overlay"}
)

Record = StepRecord | EvaluationRecord | BatchChange | LayersRecord | RunEvent | ParametersRecord
Row = tuple[Any, ...]


def _insert_into(table: str, columns: Sequence[str]) -> str:
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


RUN_COLUMNS = tuple(field.name for field in fields(RunInfo))
OWN_STEP_COLUMNS = tuple(field.name for field in fields(StepRecord) if field.name not in ("phase_seconds", "noise"))
NOISE_COLUMNS = ("headline", "method", "sampled_every", "plain_step", "preconditioned_step")
EVALUATION_COLUMNS = tuple(field.name for field in fields(EvaluationRecord) if field.name != "metrics")

INSERT_RUN = _insert_into("run", ("part", "started_unix_time", *RUN_COLUMNS))
INSERT_STEP = _insert_into("steps", (*OWN_STEP_COLUMNS, "part", *NOISE_COLUMNS))
INSERT_PHASES = _insert_into("phases", ("step", "rank", *(f"{phase}_seconds" for phase in PHASES)))
INSERT_READING = _insert_into("readings", ("step", "place", "metric", "part", "name", *READING_COLUMNS))
INSERT_EVALUATION = _insert_into("evaluations", (*EVALUATION_COLUMNS, "part"))
INSERT_METRIC = _insert_into("evaluation_metrics", ("step", "split", "name", "value"))
INSERT_CHANGE = _insert_into("batch_changes", tuple(field.name for field in fields(BatchChange)))
INSERT_EVENT = _insert_into("events", ("part", *(field.name for field in fields(RunEvent))))
INSERT_VALUE = _insert_into("parameter_values", ("step", "entry", "value", "gradient"))
FIND_ENTRY = 'SELECT id FROM parameter_entries WHERE name = ? AND subname = ? AND "index" = ?'
INSERT_ENTRY = 'INSERT INTO parameter_entries (name, subname, "index", "row", "column") VALUES (?, ?, ?, ?, ?)'
INSERT_CRITICAL = _insert_into("critical_batches", tuple(field.name for field in fields(CriticalBatch)))

step_values, evaluation_values = attrgetter(*OWN_STEP_COLUMNS), attrgetter(*EVALUATION_COLUMNS)
reading_values = attrgetter(*READING_COLUMNS)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which readings are in the database already, and where."""

    plain: Reading | None = None
    plain_step: int | None = None
    preconditioned: Reading | None = None
    preconditioned_step: int | None = None
    parts_step: int = 0

    def after(self, step: int, noise: NoiseReadings) -> Kept:
        """Once the new readings of `step` are in it too. A reading is new where it is another object."""
        preconditioned = noise.preconditioned
        return Kept(
            noise.plain,
            self.plain_step if noise.plain is self.plain else step,
            preconditioned,
            None if preconditioned is None else self._preconditioned_step(step, preconditioned),
            step if noise.parts and self.takes_parts(step) else self.parts_step,
        )

    def takes_parts(self, step: int) -> bool:
        """Whether the parts are due: always at first, later farther apart, so that a long run's file stays small."""
        return (step - self.parts_step) * PARTS_SPACING >= step

    def _preconditioned_step(self, step: int, reading: Reading) -> int | None:
        return self.preconditioned_step if reading is self.preconditioned else step


class Writer:
    """The open database of one part of a run."""

    def __init__(
        self, path: Path, info: RunInfo, critical_batches: Sequence[CriticalBatch], busy_seconds: float
    ) -> None:
        self._path = path
        _make_private(path)
        self._database = sqlite3.connect(path, timeout=busy_seconds)
        self._kept = Kept(parts_step=info.start_step)
        try:
            mode = journal_mode(path.resolve(), _read_mounts())
            self._database.execute(f"PRAGMA journal_mode = {mode}")
            self._database.execute("PRAGMA synchronous = NORMAL")
            with self._database:
                create_schema(self._database)
                self._part = self._begin_part(info)
                self._last_step = info.start_step
                self._database.execute("DELETE FROM critical_batches")
                self._database.executemany(INSERT_CRITICAL, [astuple(each) for each in critical_batches])
            self._identity = os.stat(path)
        except BaseException:
            self._database.close()
            raise

    def write(self, records: Sequence[Record]) -> None:
        """All of `records` or, with an error, none."""
        kept = self._kept
        with self._database:
            for record in records:
                match record:
                    case StepRecord():
                        kept = self._step(record, kept)
                    case BatchChange():
                        self._database.execute(INSERT_CHANGE, astuple(record))
                    case EvaluationRecord():
                        self._evaluation(record)
                    case ParametersRecord():
                        self._parameters(record)
                    case LayersRecord():
                        write_layers(self._database, record)
                    case RunEvent():
                        self._database.execute(INSERT_EVENT, (self._part, *astuple(record)))
                        if record.kind == "rolled_back":
                            self._forget_steps_after(record.step)
                            kept = Kept(parts_step=record.step)
        self._kept = kept  # only now: what is rolled back is not there to be referred to
        self._last_step = max([self._last_step, *(record.step for record in records)])

    @property
    def last_step(self) -> int:
        """Of all that was written."""
        return self._last_step

    def is_in_place(self) -> bool:
        """Whether what is written still comes to be under the path; SQLite writes on to a file that is removed."""
        try:
            return os.path.samestat(os.stat(self._path), self._identity)
        except OSError:
            return False

    def close(self) -> None:
        """Leave one plain file, which also opens from a read-only directory."""
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA journal_mode = DELETE")
        self._database.close()

    def _begin_part(self, info: RunInfo) -> int:
        """Add this process to the run, forget the steps that it will take again, and return its part's number."""
        self._forget_steps_after(info.start_step)
        (part,) = self._database.execute("SELECT coalesce(max(part), 0) + 1 FROM run").fetchone()
        self._database.execute(INSERT_RUN, (part, time.time(), *astuple(info)))
        return part

    def _forget_steps_after(self, step: int) -> None:
        for table in STEP_TABLES:
            self._database.execute(f"DELETE FROM {table} WHERE step > ?", (step,))

    def _step(self, record: StepRecord, kept: Kept) -> Kept:
        noise, before = record.noise, kept
        values: Row = (None,) * len(NOISE_COLUMNS)
        if noise is not None:
            kept = before.after(record.step, noise)
            self._database.executemany(INSERT_READING, _new_readings(record.step, noise, before, kept))
            values = (noise.headline, noise.method, noise.sampled_every, kept.plain_step, kept.preconditioned_step)
        self._database.execute(INSERT_STEP, (*step_values(record), self._part, *values))
        phases = (
            (record.step, rank, *(seconds.get(phase, math.nan) for phase in PHASES))
            for rank, seconds in enumerate(record.phase_seconds)
        )
        self._database.executemany(INSERT_PHASES, phases)
        return kept

    def _evaluation(self, record: EvaluationRecord) -> None:
        self._database.execute(INSERT_EVALUATION, (*evaluation_values(record), self._part))
        metrics = ((record.step, record.split, name, value) for name, value in record.metrics.items())
        self._database.executemany(INSERT_METRIC, metrics)

    def _parameters(self, record: ParametersRecord) -> None:
        for each in record.parameters:
            entries = [self._entry(each, place) for place in each.places]
            values = zip(entries, each.values, each.gradients, strict=True)
            self._database.executemany(INSERT_VALUE, [(record.step, *row) for row in values])

    def _entry(self, parameter: ParameterEntries, place: int) -> int:
        """The number by which the table of values names this entry; made where it is new."""
        module, _, name = parameter.name.rpartition(".")
        if (found := self._database.execute(FIND_ENTRY, (module, name, place)).fetchone()) is not None:
            return found[0]
        row, column = divmod(place, max(1, math.prod(parameter.shape[1:])))
        return self._database.execute(INSERT_ENTRY, (module, name, place, row, column)).lastrowid or 0


def _make_private(path: Path) -> None:
    """Have the file there, its owner's alone: SQLite gives what it makes beside it the same mode. No link is followed."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _new_readings(step: int, noise: NoiseReadings, before: Kept, kept: Kept) -> list[Row]:
    """Rows of `readings` for what `kept` says has come in this step."""
    rows: list[Row] = []
    if noise.plain is not before.plain:
        rows.append(_whole(step, PLAIN_PLACE, "plain", noise.plain))
    if noise.preconditioned is not None and noise.preconditioned is not before.preconditioned:
        rows.append(_whole(step, PRECONDITIONED_PLACE, "preconditioned", noise.preconditioned))
    if noise.parts and kept.parts_step == step:
        rows += [
            (step, place, each.metric, each.part, each.name, *reading_values(each.reading))
            for place, each in enumerate(noise.parts, FIRST_PART_PLACE)
        ]
    return rows


def _whole(step: int, place: int, metric: Metric, reading: Reading) -> Row:
    return (step, place, metric, WHOLE_MODEL, WHOLE_MODEL, *reading_values(reading))


def journal_mode(path: Path, mounts: str) -> str:
    """`WAL` where `path` is on a filesystem known to be local, else `TRUNCATE`.

    A write-ahead log needs memory shared by all who open the database, which network filesystems do not give.

    Args:
        path: absolute, without links.
        mounts: the text of /proc/mounts; empty where there is none.
    """
    filesystem, longest = "", -1
    for line in mounts.splitlines():
        _, mount_point, kind, *_ = line.split(" ")
        mount_point = mount_point.encode().decode("unicode_escape")
        if path.is_relative_to(mount_point) and len(mount_point) >= longest:
            filesystem, longest = kind, len(mount_point)
    return "WAL" if filesystem in LOCAL_FILESYSTEMS else "TRUNCATE"


def _read_mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return ""
