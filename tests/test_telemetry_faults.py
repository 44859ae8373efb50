"""What a run is watched by breaks, for real, while the run goes on: it trains to its end, and says what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from checkpoints import small_disk
from ddp import outcome
from ddp.errors import UsageError
from ddp.job import MetricsSection
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_steps
from ddp.telemetry.station import Station
from jobs import beside_python, finish, python, run_command, started, wait_until, write_job
from telemetry_records import feed, run_info, step_records

STEPS = 25  # a tenth of a second each
TRAIN = ("-m", "ddp", "train", "job.toml", "--allow-import", "misbehaving")
WITH_METRICS = ("--set", "metrics.enabled=true")


def _recorded_steps(path: Path) -> list[int]:
    with closing(open_recording(path)) as database:
        return [each.step for each in read_steps(database)]


def _has_steps(path: Path, at_least: int = 1) -> bool:
    """False too while there is no record yet."""
    with contextlib.suppress(UsageError, sqlite3.Error):
        return len(_recorded_steps(path)) >= at_least
    return False


@contextlib.contextmanager
def _run_at_its_first_steps(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run of one rank whose first steps are recorded, and its directory."""
    write_job(folder, "wait", step=1, steps=STEPS)
    with started(python(*TRAIN, *arguments), folder) as process:
        directory = folder / "runs" / "run"
        wait_until(lambda: _has_steps(directory / "run.db") or process.poll() is not None)
        yield process, directory


def test_a_record_that_is_removed_begins_anew(tmp_path: Path) -> None:
    with _run_at_its_first_steps(tmp_path) as (process, directory):
        for path in directory.glob("run.db*"):
            path.unlink()
        ended = finish(process)
    assert ended.code == 0, ended.stderr
    assert "run.db: was removed or replaced: it begins anew after step " in ended.stderr
    steps = _recorded_steps(directory / "run.db")
    assert steps == list(range(steps[0], STEPS + 1)) and steps[0] > 1
    assert (directory / "report.html").is_file()


def test_a_record_that_is_put_back_keeps_its_steps(tmp_path: Path) -> None:
    """Another file in its place may be a copy of it: what it has of earlier steps stays."""
    path, info = tmp_path / "run.db", run_info()
    recorder = Recorder(path, info, interval_seconds=0.05)
    feed(recorder, info, last_step=20)
    wait_until(lambda: _has_steps(path, 20))
    with closing(sqlite3.connect(path)) as database, closing(sqlite3.connect(tmp_path / "copy")) as copy:
        database.backup(copy)
    os.replace(tmp_path / "copy", path)
    for each in step_records(info, 30)[20:]:
        recorder.step(each)
    recorder.close()
    assert _recorded_steps(path) == list(range(1, 31))


def test_a_record_that_stays_locked_costs_what_comes_later(tmp_path: Path) -> None:
    with (
        _run_at_its_first_steps(tmp_path) as (process, directory),
        closing(sqlite3.connect(directory / "run.db", timeout=30.0)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        ended = finish(process)
        other.rollback()
    assert ended.code == 0, ended.stderr
    assert "the record of the run is incomplete, training goes on: database is locked" in ended.stderr
    assert "records of the run were not written" in ended.stderr
    assert f"{STEPS} steps" in ended.stdout
    assert 0 < len(_recorded_steps(directory / "run.db")) < STEPS


def test_a_run_directory_without_a_record_still_trains(tmp_path: Path) -> None:
    """Something else has its name."""
    write_job(tmp_path, steps=3)
    (tmp_path / "runs").mkdir()
    with started(python(*TRAIN), tmp_path) as process:
        wait_until(lambda: (tmp_path / "runs" / "run").is_dir() or process.poll() is not None)
        with contextlib.suppress(OSError):
            (tmp_path / "runs" / "run" / "run.db").mkdir()
        ended = finish(process)
    assert ended.code == 0, ended.stderr
    assert "3 steps" in ended.stdout


def test_closed_standard_streams_do_no_harm(tmp_path: Path) -> None:
    """The progress line goes nowhere, and nothing that is opened later is taken for standard error."""
    write_job(tmp_path, steps=4)
    command = ["sh", "-c", 'exec "$0" "$@" <&- 2>&-', *python(*TRAIN)]
    ended = run_command(command, tmp_path)
    assert ended.code == 0, ended.stdout
    assert "4 steps" in ended.stdout and "examples/s" not in ended.stdout
    assert _recorded_steps(tmp_path / "runs" / "run" / "run.db") == [1, 2, 3, 4]


def test_a_reader_of_standard_error_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    write_job(tmp_path, "wait", step=1, steps=8)
    command = ["sh", "-c", '"$0" "$@" 2>&1 >out | head -c 1 >head; exit 0', *python(*TRAIN)]
    assert run_command(command, tmp_path).code == 0
    assert "8 steps" in (tmp_path / "out").read_text()
    assert outcome.read(tmp_path / "runs" / "run" / "outcome.json") == outcome.success(0, 1)


def test_a_metrics_server_that_dies_does_not_end_the_run(tmp_path: Path) -> None:
    info = run_info()
    station = Station(MetricsSection(), info)
    try:
        station.open(tmp_path)
        assert station.server is not None
        feed(station.sinks, info, last_step=10)
        station.server.close()
        for each in step_records(info, 20)[10:]:
            station.sinks.step(each)
        assert "20 steps" in station.finish()
    finally:
        station.close()


def _fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_at_the_end_fails_no_finished_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    info = run_info()
    with small_disk(tmp_path / "disk", "1m") as disk:
        station = Station(MetricsSection(enabled=False), info)
        try:
            station.open(disk)
            feed(station.sinks, info, last_step=20)
            wait_until(lambda: _has_steps(disk / "run.db"))
            _fill(disk)
            feed(station.sinks, info)
            assert f"{info.steps} steps" in station.finish()
        finally:
            station.close()
        outcome.record(outcome.success(0, 1), disk)
        names = {path.name for path in disk.iterdir()} - {"filler", "run.db-journal"}
    assert "the record of the run is incomplete" in caplog.text
    assert "no report of this run" in caplog.text
    assert re.search(
        r"warning: .*outcome.json: how this rank ended cannot be noted there: No space", capsys.readouterr().err
    )
    assert names <= {"run.db", "run.db-wal", "run.db-shm", "log.jsonl"}  # no halves of pages or outcomes


def _sample(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5.0) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_are_served_while_a_rank_is_stopped(tmp_path: Path) -> None:
    """Rank 0 waits for it outside of Python's lock; the time of the latest step gets old, which is alerted on."""
    write_job(tmp_path, "wait", step=1, steps=40)
    command = [beside_python("torchrun"), "--standalone", "--nproc-per-node=2", *TRAIN, *WITH_METRICS]
    target = tmp_path / "runs" / "targets" / "run.json"
    with started(command, tmp_path) as process:
        wait_until(lambda: ((tmp_path / "waiting-1").exists() and target.exists()) or process.poll() is not None)
        (address,) = json.loads(target.read_text())[0]["targets"]
        wait_until(lambda: _sample(address, "ddp_steps_total") >= 3)
        stopped = int((tmp_path / "waiting-1").read_text())
        os.kill(stopped, signal.SIGSTOP)
        try:
            latest: list[float] = []
            wait_until(lambda: _stands_still(latest, _sample(address, "ddp_last_step_timestamp_seconds")))
            assert _sample(address, "ddp_run_finished") == 0
            steps = _sample(address, "ddp_steps_total")
            assert steps < 40
        finally:
            os.kill(stopped, signal.SIGCONT)
        wait_until(lambda: _sample(address, "ddp_steps_total") > steps)
        ended = finish(process)
    assert ended.code == 0, ended.stderr


def _stands_still(seen: list[float], value: float) -> bool:
    """Whether fifty scrapes in a row, a second and more, gave the same value."""
    seen.append(value)
    return len(seen) >= 50 and len(set(seen[-50:])) == 1
