"""The tables of `run.db`: what is kept of a run, one version of it.

SQLite has no NaN: it stores NULL instead (infinities it keeps). So NULL in a measured column means NaN, and
what is absent is told by a column that is never measured: `plain_step` is NULL where the noise scale is off.

A noise scale that no new observation has moved is not written again. `steps.plain_step` and
`steps.preconditioned_step` name the step whose row of `readings` holds: a step is read with two look-ups, also
where only every tenth is read. Readings of layers and groups lie in the same table under their names, with their
place in the model beside them.

`part` of `run`, `steps` and `events` counts the processes that continued one run; the steps of an interrupted part
that a resume did not start from are replaced by its own, and so are those that a roll-back went behind. Events stay:
they happened, and those of an interrupted part say why it was interrupted.

`views` has what is made for questions: runs, training, validation, parameters.
"""

from __future__ import annotations

import sqlite3
from dataclasses import fields

from ddp.noise.noise_scale import Reading
from ddp.telemetry.layer_record import LAYER_SCHEMA
from ddp.telemetry.layer_record import TABLES as LAYER_TABLES
from ddp.telemetry.records import PHASES
from ddp.telemetry.views import views

SCHEMA_VERSION = 4
OLDEST_VERSION = 3  # that is still read, and taken over where a run goes on; see `create_schema`

WHOLE_MODEL = ""  # `readings.part` where the reading is of no part
PLAIN_PLACE, PRECONDITIONED_PLACE, FIRST_PART_PLACE = 0, 1, 2  # `readings.place`
READING_COLUMNS = tuple(field.name for field in fields(Reading))

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS run (
    part INTEGER PRIMARY KEY, started_unix_time REAL NOT NULL,
    run_id TEXT NOT NULL, task TEXT NOT NULL, optimizer TEXT NOT NULL, transport TEXT NOT NULL,
    version TEXT NOT NULL, world_size INTEGER NOT NULL, global_batch_size INTEGER NOT NULL,
    micro_batch_size INTEGER NOT NULL, training_examples INTEGER NOT NULL, validation_examples INTEGER NOT NULL,
    steps INTEGER NOT NULL, steps_per_epoch INTEGER NOT NULL, epochs REAL NOT NULL, metric TEXT NOT NULL,
    target REAL, start_step INTEGER NOT NULL, restarts INTEGER NOT NULL, goal TEXT NOT NULL, nodes INTEGER NOT NULL,
    gradient_bytes INTEGER NOT NULL, learning_rate_rule TEXT NOT NULL, sampling TEXT NOT NULL, batch_statistics INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY, part INTEGER NOT NULL, epoch REAL, unix_time REAL, examples INTEGER NOT NULL,
    examples_total INTEGER NOT NULL, loss REAL, learning_rate REAL, gradient_norm REAL, duration_seconds REAL,
    all_reduce_bytes INTEGER NOT NULL, straggler_rank INTEGER NOT NULL, global_batch_size INTEGER NOT NULL,
    slowdown_ratio REAL, metric REAL, momentum REAL, cpu_seconds REAL,
    headline TEXT, method TEXT, sampled_every INTEGER, plain_step INTEGER, preconditioned_step INTEGER);
CREATE TABLE IF NOT EXISTS phases (
    step INTEGER NOT NULL, rank INTEGER NOT NULL, {", ".join(f"{phase}_seconds REAL" for phase in PHASES)},
    PRIMARY KEY (step, rank)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS readings (
    step INTEGER NOT NULL, place INTEGER NOT NULL, metric TEXT NOT NULL, part TEXT NOT NULL, name TEXT NOT NULL,
    state TEXT NOT NULL, noise_scale REAL, low REAL, high REAL, squared_norm REAL, variance_trace REAL,
    observations INTEGER NOT NULL, window INTEGER NOT NULL, steps_needed REAL, drifting INTEGER NOT NULL,
    PRIMARY KEY (step, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_changes (
    step INTEGER PRIMARY KEY, epoch REAL, unix_time REAL, before INTEGER NOT NULL, after INTEGER NOT NULL,
    learning_rate_factor REAL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    step INTEGER NOT NULL, split TEXT NOT NULL, part INTEGER NOT NULL, epoch REAL, unix_time REAL,
    examples INTEGER NOT NULL, loss REAL, penalty REAL, PRIMARY KEY (step, split)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluation_metrics (
    step INTEGER NOT NULL, split TEXT NOT NULL, name TEXT NOT NULL, value REAL,
    PRIMARY KEY (step, split, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, part INTEGER NOT NULL, step INTEGER NOT NULL, unix_time REAL, kind TEXT NOT NULL,
    rank INTEGER NOT NULL, text TEXT NOT NULL, duration_seconds REAL, stall_seconds REAL);
CREATE TABLE IF NOT EXISTS critical_batches (
    method TEXT NOT NULL, optimizer TEXT NOT NULL, target TEXT NOT NULL, critical_batch_size REAL, low REAL, high REAL);
CREATE TABLE IF NOT EXISTS parameter_entries (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, subname TEXT NOT NULL, "index" INTEGER NOT NULL,
    "row" INTEGER NOT NULL, "column" INTEGER NOT NULL, UNIQUE (name, subname, "index"));
CREATE TABLE IF NOT EXISTS parameter_values (
    step INTEGER NOT NULL, entry INTEGER NOT NULL, value REAL, gradient REAL, PRIMARY KEY (step, entry)) WITHOUT ROWID;
"""
STEP_TABLES = (
    *("steps", "phases", "readings", "batch_changes", "evaluations", "evaluation_metrics", "parameter_values"),
    *LAYER_TABLES,
)
ADDED_COLUMNS = {  # since OLDEST_VERSION
    "run": ("sampling TEXT NOT NULL DEFAULT 'uniform'",),
    "steps": ("metric REAL", "momentum REAL", "cpu_seconds REAL"),
    "evaluations": ("penalty REAL",),
}


def create_schema(database: sqlite3.Connection) -> None:
    """Make the tables and views where they are missing; a record of an older version that is known becomes this one's.

    Whatever is written, is written in one transaction: a kill leaves the old version or the new one.

    Raises:
        sqlite3.DatabaseError: the file is of another version of the schema, or no database.
    """
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, *range(OLDEST_VERSION, SCHEMA_VERSION + 1)):
        raise sqlite3.DatabaseError(f"its schema is version {version}, this program writes {SCHEMA_VERSION}")
    added = "".join(
        f"ALTER TABLE {table} ADD COLUMN {column};\n"
        for table, columns in ADDED_COLUMNS.items()
        for column in columns
        if version and column.split()[0] not in columns_of(database, table)
    )
    whole = f"BEGIN IMMEDIATE;\n{added}{SCHEMA}{LAYER_SCHEMA}{views()}PRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;"
    try:
        database.executescript(whole)
    except sqlite3.Error:
        database.rollback()
        raise


def columns_of(database: sqlite3.Connection, table: str, file: str = "main") -> list[str]:
    """Names of the columns of a table of `file`, a name of an attached database; [] where there is none."""
    return [name for (name,) in database.execute("SELECT name FROM pragma_table_info(?, ?)", (table, file))]
