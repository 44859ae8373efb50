"""The trials of a critical-batch search in one SQLite file, `sweep.db`: what has finished stays, whatever ends the search.

One process writes, one transaction a trial; anybody may read meanwhile. Beside the trials lie a few facts of the
whole search (its definition, the targets chosen), so that a search that goes on is the one that was begun.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ddp.errors import DdpError, UsageError

FILE_NAME = "sweep.db"
VERSION = 1
DEFINITION = "definition"  # the fact of what is searched
MACHINE_ERRORS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

TrialMethod = Literal["sweep", "pilot", "branched"]
StoppedBecause = Literal["targets", "diverged", "budget", "hopeless", "failed"]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One training run of a search. Per target: tuples as long as `targets`, NaN where a target was not reached.

    Attributes:
        optimizer: optimizer.name of the job.
        batch_size: examples a step.
        learning_rate: constant, after a warm-up where the job has one.
        seed: of the initial weights, of the order of the data and of whatever the model draws.
        method: "sweep"; "pilot" for the runs that targets are chosen from; "branched" for those that begin at a
            checkpoint, whose steps count from there.
        targets: training losses on the fixed subset, falling.
        steps_to_target: interpolated on the smoothed curve, so not whole.
        examples_to_target: steps times batch size.
        validation_loss_at_target, validation_metric_at_target: `metric` is the job's `evaluation.metric`.
        noise_plain, noise_preconditioned: Bbar in examples from the first step to each target: the noise scale over
            windows, weighted by 1/(1 + B/b). NaN where not measured; above 0 and infinite where the gradient
            is nothing but noise.
        seconds: of the whole trial, evaluations included.
        seconds_per_step: median of plain training steps, on one thread unless on a GPU.
        peak_memory_bytes: of the trial's process, interpreter and data included.
        stopped_because: "targets" all reached; "diverged"; "budget" of examples used up; "hopeless" against a run
            at this batch size that is known to be better; "failed", with the cause.
        curve: (step, training loss on the subset), not smoothed, step 0 first.
        multiple: for "branched", the batch size over that of the checkpoint's run.
        origin: for "branched", the checkpoint.
    """

    optimizer: str
    batch_size: int
    learning_rate: float
    seed: int
    method: TrialMethod
    targets: tuple[float, ...]
    steps_to_target: tuple[float, ...]
    examples_to_target: tuple[float, ...]
    validation_loss_at_target: tuple[float, ...]
    validation_metric_at_target: tuple[float, ...]
    seconds: float
    seconds_per_step: float
    peak_memory_bytes: int
    diverged: bool
    stopped_because: StoppedBecause
    curve: tuple[tuple[int, float], ...]
    noise_plain: tuple[float, ...]
    noise_preconditioned: tuple[float, ...]
    steps: int = 0
    cause: str = ""
    multiple: float = math.nan
    origin: str = ""


_COLUMNS = tuple(field.name for field in fields(TrialResult))
_KEY = ("method", "origin", "optimizer", "batch_size", "learning_rate", "seed")
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS trials ({", ".join(f"{name} ANY" for name in _COLUMNS)}, PRIMARY KEY ({", ".join(_KEY)})) STRICT;
"""


def write_trial(path: Path, trial: TrialResult) -> None:
    """Add `trial` to the database at `path`, made where missing; one of the same key is replaced."""
    with _opened(path) as database, database:
        marks = ", ".join("?" * len(_COLUMNS))
        values = [_to_sql(getattr(trial, name)) for name in _COLUMNS]
        database.execute(f"INSERT OR REPLACE INTO trials ({', '.join(_COLUMNS)}) VALUES ({marks})", values)


def read_trials(path: Path) -> list[TrialResult]:
    """All trials in the order they were written; none where there is no database.

    Raises:
        UsageError: the file is no database of trials, or one of another version.
    """
    if not path.exists():
        return []
    with _opened(path) as database:
        rows = database.execute(f"SELECT {', '.join(_COLUMNS)} FROM trials ORDER BY rowid").fetchall()
    return [TrialResult(*(_from_sql(name, value) for name, value in zip(_COLUMNS, row, strict=True))) for row in rows]


def remove_failed(path: Path) -> int:
    """Forget trials that failed, so that they are tried again; how many there were."""
    with _opened(path) as database, database:
        return database.execute("DELETE FROM trials WHERE stopped_because = 'failed'").rowcount


def write_fact(path: Path, name: str, value: Any) -> None:
    """Keep a JSON-able value of the whole search under `name`."""
    with _opened(path) as database, database:
        database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def read_fact(path: Path, name: str) -> Any:
    """The value under `name`, None where there is none."""
    if not path.exists():
        return None
    with _opened(path) as database:
        row = database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row[0])


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=30.0)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise UsageError(f"{path}: a search's record of version {version}; this program reads {VERSION}")
            if version == 0:
                with database:
                    database.executescript(f"{_SCHEMA} PRAGMA user_version = {VERSION};")
            yield database
    except sqlite3.OperationalError as error:
        raise _unwritten(path, error) from None
    except sqlite3.DatabaseError as error:
        raise UsageError(f"{path}: cannot be used as a search's record: {error}") from None


def _unwritten(path: Path, error: sqlite3.OperationalError) -> DdpError:
    """A full disk and the like are not the user's request; what SQLite committed before is whole."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in MACHINE_ERRORS:
        return UsageError(f"{path}: cannot be used as a search's record: {error}")
    return DdpError(
        f"{path}: cannot be written or read: {error}; the trials that finished before are kept: go on with --resume "
        "once the cause is gone"
    )


def _to_sql(value: object) -> object:
    """Sequences as JSON, which SQLite has not; what is not finite as text, for which neither has a number."""
    return json.dumps(_plain(value), allow_nan=False) if isinstance(value, tuple) else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]  # type: ignore[reportUnknownVariableType]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_sql(name: str, value: Any) -> Any:
    kind = TrialResult.__dataclass_fields__[name].type
    if name == "curve":
        return tuple((int(step), float(loss)) for step, loss in json.loads(value))
    if isinstance(kind, str) and kind.startswith("tuple"):
        return tuple(float(each) for each in json.loads(value))
    if kind == "float":
        return float(value)
    return bool(value) if kind == "bool" else value
