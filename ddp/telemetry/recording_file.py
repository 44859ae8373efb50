"""Opens a `run.db` for reading: it is one of ours, and of a version that is known."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from ddp.errors import UsageError
from ddp.telemetry.record_values import readable
from ddp.telemetry.schema import OLDEST_VERSION, SCHEMA_VERSION, create_schema


def open_recording(path: Path) -> sqlite3.Connection:
    """Open a `run.db` for reading, also while the run still writes to it.

    One of an older version is read into memory and brought up to date there; the file stays as it is.

    Raises:
        UsageError: there is none, or it is not one of ours.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a link, which is not followed: put what it leads to in its place")
    if not path.is_file():
        raise UsageError(f"{path}: no record of a run here; name the directory of a run, for example runs/<run id>")
    with readable(path):
        database = sqlite3.connect(read_only_uri(path), uri=True, timeout=5.0)
        try:
            check_version(path, database)
            if _version(database) != SCHEMA_VERSION:
                database = _brought_up_to_date(database)
        except BaseException:
            database.close()
            raise
        database.row_factory = sqlite3.Row
    return database


def read_only_uri(path: Path) -> str:
    """Under which SQLite opens the file, whatever its name is, and never writes to it."""
    return f"{path.resolve().as_uri()}?mode=ro"


def check_version(path: Path, database: sqlite3.Connection, file: str = "main") -> None:
    """Of the record at `path`, open in `database` under the name `file`.

    Raises:
        UsageError: it is none that this program reads.
        sqlite3.DatabaseError: it is no database.
    """
    version = _version(database, file)
    if not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        raise UsageError(f"{path}: {_foreign(version)}")


def _version(database: sqlite3.Connection, file: str = "main") -> int:
    return database.execute(f"PRAGMA {file}.user_version").fetchone()[0]


def _brought_up_to_date(database: sqlite3.Connection) -> sqlite3.Connection:
    copy = sqlite3.connect(":memory:")
    with closing(database):
        database.backup(copy)
    create_schema(copy)
    return copy


def _foreign(version: int) -> str:
    """Why a file of another schema is not read, and what to do."""
    reads = f"not a record that this program reads (versions {OLDEST_VERSION} to {SCHEMA_VERSION})"
    if not version:
        return f"{reads}: an empty file or another program's database"
    other = "an older" if version < OLDEST_VERSION else "a newer"
    return f"{reads}: version {version}; read it with {other} ddp, the one that made it"
