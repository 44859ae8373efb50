"""Many runs' records as one database: every table over all runs, with the run's id in each row.

    with closing(gather(["runs/*"])) as database:
        database.execute("SELECT run_id, max(accuracy) FROM validation GROUP BY run_id")

Each file is attached read-only, copied in one transaction, so that a run that goes on is seen at one moment, and
detached: SQLite attaches ten files at most, and runs are more. What is copied are tables by their names and columns; views,
triggers and whatever else somebody may have put into a file stay there. The copy is a temporary database of this
process: in memory while it is small, then in an unnamed file of SQLite's own. What is done to it reaches no run.
"""

from __future__ import annotations

import glob
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ddp.errors import UsageError
from ddp.telemetry.record_values import readable
from ddp.telemetry.recording_file import check_version, read_only_uri
from ddp.telemetry.schema import columns_of, create_schema
from ddp.telemetry.views import VIEW_NAMES, views

RECORD = "run.db"
SOURCE = "source"  # what the attached file is called
BUSY_SECONDS = 5.0

logger = logging.getLogger(__name__)


def gather(paths: str | Path | Iterable[str | Path]) -> sqlite3.Connection:
    """All runs under `paths` in one database; close it when done.

    The tables are those of a `run.db` (`schema`, `views`) with `run_id` before their columns; `run` and `runs` have
    besides it the `path` of the file. Where two files name the same run, `run_id` is followed by the folder.

    Args:
        paths: run directories, `run.db` files, or patterns of these (`runs/*`, `sweep/**/run.db`).

    Raises:
        UsageError: a path has no record, a pattern finds none, or one cannot be read. Of what a pattern finds, folders
            without a record are passed over, and records that cannot be read too, with a warning.
    """
    files = _files([paths] if isinstance(paths, str | Path) else paths)
    database = sqlite3.connect("", uri=True, timeout=BUSY_SECONDS)
    try:
        database.execute("PRAGMA trusted_schema = OFF")
        tables = _make_tables(database)
        for file, run_id in _named_apart(_run_ids(database, files)).items():
            with _attached(database, file), database:
                for table, columns in tables.items():
                    _copy(database, table, columns, run_id, str(file))
        database.executescript(views(many=True))
    except BaseException:
        database.close()
        raise
    return database


def _files(paths: Iterable[str | Path]) -> dict[Path, bool]:
    """The records, each once, in the order in which they are named; whether it was named itself, not by a pattern."""
    found: dict[Path, bool] = {}
    for path in paths:
        if Path(path).exists() or not glob.has_magic(str(path)):
            found[_record(Path(path))] = True
            continue
        records = [_record(Path(each)) for each in sorted(glob.glob(str(path), recursive=True))]
        records = [record for record in records if record.is_file()]
        if not records:
            raise UsageError(f"{path}: no run with a {RECORD} is there")
        for record in records:
            found.setdefault(record, False)
    if not found:
        raise UsageError("no run is named: give directories of runs, for example runs/*")
    return found


def _record(path: Path) -> Path:
    file = path / RECORD if path.is_dir() else path
    return file if file.is_symlink() else file.resolve()


def _make_tables(database: sqlite3.Connection) -> dict[str, list[str]]:
    """Empty tables for all runs; their names and the columns of each that a run's file has."""
    create_schema(database)
    for view in VIEW_NAMES:
        database.execute(f"DROP VIEW {view}")
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()]
    tables = {name: columns_of(database, name) for name in names}
    for name, columns in tables.items():
        others = [f'"{column}"' for column in columns if column != "run_id"]
        path = ["path"] if name == "run" else []
        database.execute(f"DROP TABLE {name}")
        database.execute(f"CREATE TABLE {name} (run_id, {', '.join([*path, *others])})")
        order = [f'"{column}"' for column in ("step", "part", "id") if column in columns]
        database.execute(f"CREATE INDEX {name}_by_run ON {name} ({', '.join(['run_id', *order])})")
    database.commit()
    return tables


def _run_ids(database: sqlite3.Connection, files: dict[Path, bool]) -> dict[Path, str]:
    """What each file calls its run. One that was only found by a pattern may turn out not to be readable."""
    found: dict[Path, str] = {}
    for file, named in files.items():
        try:
            found[file] = _run_id(database, file)
        except UsageError as error:
            if named:
                raise
            logger.warning("%s; passed over", error)
    if not found:
        raise UsageError("none of the records found can be read")
    return found


def _run_id(database: sqlite3.Connection, file: Path) -> str:
    if file.is_symlink():
        raise UsageError(f"{file} is a link, which is not followed: name what it leads to")
    if not file.is_file():
        raise UsageError(f"{file}: no record of a run here; name the directory of a run, for example runs/<run id>")
    with _attached(database, file):
        check_version(file, database, SOURCE)
        newest = database.execute(f"SELECT run_id FROM {SOURCE}.run ORDER BY part DESC LIMIT 1").fetchone()
    if newest is None:
        raise UsageError(f"{file}: the run has not begun to record; try again in a few seconds")
    return str(newest[0])


def _named_apart(run_ids: dict[Path, str]) -> dict[Path, str]:
    """With the folder behind an id that several files have: steps of two runs must not mix."""
    counts = Counter(run_ids.values())
    return {file: f"{name} ({file.parent})" if counts[name] > 1 else name for file, name in run_ids.items()}


@contextmanager
def _attached(database: sqlite3.Connection, file: Path) -> Iterator[None]:
    with readable(file):
        database.execute(f"ATTACH ? AS {SOURCE}", (read_only_uri(file),))
        try:
            yield
        finally:
            database.execute(f"DETACH {SOURCE}")


def _copy(database: sqlite3.Connection, table: str, columns: list[str], run_id: str, file: str) -> None:
    """Columns that a file of an older version has not are NULL; a view or a virtual table in a table's place is none."""
    kind = f"SELECT 1 FROM {SOURCE}.sqlite_schema WHERE name = ? AND type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'"
    if database.execute(kind, (table,)).fetchone() is None:
        return
    there = columns_of(database, table, SOURCE)
    taken = [column for column in columns if column != "run_id" and column in there]
    values = [f'"{column}"' for column in taken]
    path = {"path": "?2"} if table == "run" else {}
    into = ", ".join(["run_id", *path, *values])
    database.execute(
        f"INSERT INTO {table} ({into}) SELECT {', '.join(['?1', *path.values(), *values])} FROM {SOURCE}.{table}",
        (run_id, file) if path else (run_id,),
    )
