"""A record of the release before: read as it is, taken over by a run that goes on, whole after a kill."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ddp.job import MetricsSection
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_evaluations, read_parts, read_steps
from ddp.telemetry.report import write_report
from ddp.telemetry.schema import SCHEMA_VERSION, create_schema
from ddp.telemetry.station import Station
from telemetry_records import feed, make_older, run_info, step_records

STEPS = 46


@pytest.fixture
def older(tmp_path: Path) -> Path:
    recorder = Recorder(tmp_path / "run.db", run_info())
    feed(recorder, run_info(), STEPS)
    recorder.close()
    make_older(tmp_path / "run.db")
    return tmp_path / "run.db"


def test_it_is_read_and_stays_as_it_is(older: Path) -> None:
    before = older.read_bytes()
    with closing(open_recording(older)) as database:
        assert repr(list(read_steps(database))) == repr(step_records(run_info(), STEPS))
        assert all(record.penalty != record.penalty for record in read_evaluations(database))  # not a number
        assert database.execute("SELECT count(*), count(momentum) FROM training").fetchone()[:] == (STEPS, 0)
    assert "digits-1" in write_report(older.parent).read_text()
    assert older.read_bytes() == before


def test_a_run_that_goes_on_takes_it_over(older: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = run_info(start_step=23, restarts=1)
    station = Station(MetricsSection(enabled=False), info)
    station.open(older.parent)
    for record in step_records(info, 30):
        station.sinks.step(replace(record, momentum=0.9, cpu_seconds=0.5, metric=0.75))
    assert "30 steps" in station.finish()
    station.close()
    assert [message for message in caplog.messages if "incomplete" in message or "will not know" in message] == []
    with closing(open_recording(older)) as database:
        assert [part.start_step for part in read_parts(database)] == [0, 23]
        rows = database.execute("SELECT step, momentum, accuracy, cpu_seconds FROM training ORDER BY step").fetchall()
    assert list(map(tuple, rows[:23])) == [(step, None, None, None) for step in range(1, 24)]
    assert list(map(tuple, rows[23:])) == [(step, 0.9, 0.75, (step - 23) / 2) for step in range(24, 31)]


def test_what_takes_it_over_does_all_or_nothing(older: Path) -> None:
    """Something is in the way of a table that comes after columns were added: the older version stays."""
    with closing(sqlite3.connect(older)) as database:
        database.execute("CREATE INDEX parameter_entries ON steps (epoch)")
        database.commit()
        before = [*database.iterdump()]
        with closing(sqlite3.connect(older)) as broken:
            with pytest.raises(sqlite3.OperationalError, match="already an index"):
                create_schema(broken)
            assert not broken.in_transaction
        assert [*database.iterdump()] == before
        assert database.execute("PRAGMA user_version").fetchone() == (3,)


def test_one_of_a_version_that_is_not_known_is_left_alone(older: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(older)) as database:
        database.execute("PRAGMA user_version = 2")
        before = [*database.iterdump()]
    with caplog.at_level(logging.WARNING):
        recorder = Recorder(older, run_info(start_step=STEPS), interval_seconds=0.01)
        feed(recorder, run_info(start_step=STEPS), STEPS + 2)
        recorder.close()
    assert f"its schema is version 2, this program writes {SCHEMA_VERSION}" in caplog.text
    with closing(sqlite3.connect(older)) as database:
        assert [*database.iterdump()] == before
