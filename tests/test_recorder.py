"""What goes in comes out, from real files: finished, in progress, killed, resumed, locked and full."""

from __future__ import annotations

import itertools
import logging
import math
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ddp.errors import UsageError
from ddp.noise.readings import NoiseReadings
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import (
    count_steps,
    mean_phase_seconds,
    open_recording,
    read_batch_changes,
    read_critical_batches,
    read_evaluations,
    read_parts,
    read_parts_over_time,
    read_steps,
    replay,
)
from ddp.telemetry.recording_writer import PARTS_SPACING, journal_mode
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    Sink,
    StepRecord,
)
from telemetry_records import (
    adam_steps,
    batch_changes,
    evaluation_records,
    feed,
    part_readings,
    reading,
    run_info,
    step_records,
    with_reading,
)

DEADLINE_SECONDS = 60.0


def read(path: Path) -> tuple[list[StepRecord], list[EvaluationRecord]]:
    with closing(open_recording(path)) as database:
        return list(read_steps(database)), read_evaluations(database)


def wait_for_steps(path: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        try:
            with closing(open_recording(path)) as database:
                if count_steps(database) >= count:
                    return
        except (UsageError, sqlite3.OperationalError):
            pass  # not made yet
        time.sleep(0.05)
    pytest.fail(f"{path}: fewer than {count} steps after {DEADLINE_SECONDS} s")


def test_all_records_survive_the_round_trip(tmp_path: Path) -> None:
    info, path = run_info(), tmp_path / "run.db"
    recorder = Recorder(path, info)
    feed(recorder, info)
    recorder.close()
    recorder.close()
    steps, evaluations = read(path)
    assert repr(steps) == repr(step_records(info))  # repr: a NaN equals itself
    assert sorted(map(repr, evaluations)) == sorted(map(repr, evaluation_records(info)))
    with closing(open_recording(path)) as database:
        assert read_parts(database) == [info]
        means = mean_phase_seconds(database)
    waits = [record.phase_seconds[1]["wait"] for record in step_records(info)]
    assert means[1]["wait"] == pytest.approx(sum(waits) / len(waits))
    assert [file.name for file in tmp_path.iterdir()] == ["run.db"]  # one plain file, without a log beside it


def test_nan_infinity_and_absence_stay_apart(tmp_path: Path) -> None:
    info, path = run_info(), tmp_path / "run.db"
    first, second, third = step_records(info, 3)
    odd = [
        replace(first, loss=math.nan, gradient_norm=math.inf, phase_seconds=()),
        replace(second, loss=-math.inf, noise=None),
        with_reading(third, replace(reading("lower_bound", math.nan, 12.5, math.inf), drifting=True)),
    ]
    evaluation = replace(evaluation_records(info)[0], loss=math.nan, metrics={"accuracy": math.nan, "x": math.inf})
    recorder = Recorder(path, info)
    for record in odd:
        recorder.step(record)
    recorder.evaluation(evaluation)
    recorder.close()
    assert [list(map(repr, records)) for records in read(path)] == [list(map(repr, odd)), [repr(evaluation)]]


def record_all(path: Path, records: list[StepRecord] | list[BatchChange]) -> None:
    recorder = Recorder(path, run_info())
    for record in records:
        if isinstance(record, StepRecord):
            recorder.step(record)
        else:
            recorder.batch_change(record)
    recorder.close()


def without_parts(steps: list[StepRecord]) -> list[StepRecord]:
    return [replace(record, noise=replace(record.noise, parts=())) for record in steps if record.noise]


def test_both_metrics_and_all_parts_survive_the_round_trip(tmp_path: Path) -> None:
    path, steps = tmp_path / "run.db", adam_steps(run_info(), 100)
    record_all(path, steps)
    expected = without_parts(steps)
    assert repr(read(path)[0]) == repr(expected)
    with closing(open_recording(path)) as database:
        parts = read_parts_over_time(database)
        spread = read_parts_over_time(database, most=4)
        assert repr(list(read_steps(database, every=7))) == repr(
            [r for r in expected if r.step % 7 == 0 or r.step == 100]
        )
    sampled = [record for record in steps if record.noise and record.noise.parts]
    assert [(each.step, each.epoch, repr(each.parts)) for each in parts] == [
        (record.step, record.epoch, repr(record.noise.parts)) for record in sampled if record.noise
    ]
    assert len(parts) == 20 and len(parts[0].parts) == 28
    assert [each.step for each in spread] == [5, 35, 70, 100] and set(map(repr, spread)) <= set(map(repr, parts))


def test_a_reading_that_nothing_moved_is_written_once(tmp_path: Path) -> None:
    path, steps = tmp_path / "run.db", adam_steps(run_info(), 100, sampled_every=10)
    record_all(path, steps)
    count = "SELECT metric, count(*) FROM readings WHERE part = '' GROUP BY metric"
    with closing(open_recording(path)) as database:
        assert dict(map(tuple, database.execute(count))) == {"plain": 100, "preconditioned": 11}


def test_a_preconditioner_that_comes_and_goes(tmp_path: Path) -> None:
    first, second, third, fourth = step_records(run_info(), 4)
    plain, other = reading("resolved", 10.0, 8.0, 12.0), reading("resolved", 20.0, 16.0, 24.0)
    noises = [
        NoiseReadings(plain, other, "preconditioned", "split", sampled_every=3),
        NoiseReadings(plain),
        None,
        NoiseReadings(plain, other, method="none"),
    ]
    steps = [replace(step, noise=noise) for step, noise in zip((first, second, third, fourth), noises, strict=True)]
    record_all(tmp_path / "run.db", steps)
    assert repr(read(tmp_path / "run.db")[0]) == repr(steps)


def test_parts_of_a_long_run_get_sparser_and_keep_its_shape(tmp_path: Path) -> None:
    """Every step at first, then 1/200 of the run apart: 200 moments for each factor of e."""
    path, template = tmp_path / "run.db", step_records(run_info(), 1)[0]
    noise = NoiseReadings(reading("resolved", 10, 8, 12), parts=part_readings(100, 1))
    record_all(path, [replace(template, step=step, noise=noise) for step in range(1, 4_001)])
    with closing(open_recording(path)) as database:
        kept = [each.step for each in read_parts_over_time(database)]
    assert kept[:PARTS_SPACING] == list(range(1, PARTS_SPACING + 1))
    gaps = [(after - before, after) for before, after in itertools.pairwise(kept)]
    assert all((gap - 1) * PARTS_SPACING < after for gap, after in gaps)
    assert len(kept) < PARTS_SPACING * (1 + math.log(4_000 / PARTS_SPACING))
    assert 4_000 - kept[-1] <= 4_000 / PARTS_SPACING


def test_batch_changes_and_measured_critical_batches_survive_the_round_trip(tmp_path: Path) -> None:
    path, info = tmp_path / "run.db", run_info()
    changes = [*batch_changes(info)]
    changes[1] = replace(changes[1], learning_rate_factor=math.nan)
    measured = (CriticalBatch("sweep", "adam", "loss 0.3", 147.0, 120.5, math.inf),)
    measured += (CriticalBatch("branched", "adam", "loss 0.3", 90.0, math.nan, math.nan),)
    for given in ((), measured):  # a resume may name another result
        recorder = Recorder(path, info, given)
        for record in changes:
            recorder.batch_change(record)
        recorder.close()
        with closing(open_recording(path)) as database:
            assert repr(read_batch_changes(database)) == repr(changes)
            assert repr(tuple(read_critical_batches(database))) == repr(given)


def test_a_reading_written_in_vain_is_written_again(tmp_path: Path) -> None:
    """After a transaction that failed, a later step must not refer to the reading that was rolled back."""
    path, steps = tmp_path / "run.db", adam_steps(run_info(), 12, sampled_every=10)
    recorder = Recorder(path, run_info(), interval_seconds=0.02, busy_seconds=0.02)
    wait_for_steps(path, 0)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        for record in steps[:10]:
            recorder.step(record)
        time.sleep(0.3)  # several attempts fail meanwhile
        other.rollback()
    for record in steps[10:]:
        recorder.step(record)
    recorder.close()
    expected = without_parts(steps)
    assert repr(read(path)[0]) == repr(expected)


class Heard(Sink):
    """A sink that keeps all it hears, in order."""

    def __init__(self) -> None:
        self.records: list[StepRecord | EvaluationRecord | BatchChange] = []

    def step(self, record: StepRecord) -> None:
        self.records.append(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self.records.append(record)

    def batch_change(self, record: BatchChange) -> None:
        self.records.append(record)


def test_a_replay_tells_what_the_run_told_in_its_order(tmp_path: Path) -> None:
    """An evaluation comes after the step that it was made at, the last one after all."""
    info, path = run_info(), tmp_path / "run.db"
    told, again = Heard(), Heard()
    feed(told, info)
    recorder = Recorder(path, info)
    feed(recorder, info)
    recorder.close()
    with closing(open_recording(path)) as database:
        replay(read_steps(database), read_evaluations(database), (), again)
    assert isinstance(told.records[-1], EvaluationRecord)
    assert [(type(each), each.step) for each in again.records] == [(type(each), each.step) for each in told.records]
    assert sorted(map(repr, again.records)) == sorted(map(repr, told.records))


def test_a_run_in_progress_can_be_read(tmp_path: Path) -> None:
    info, path = run_info(), tmp_path / "run.db"
    recorder = Recorder(path, info, interval_seconds=0.05)
    feed(recorder, info, last_step=40)
    wait_for_steps(path, 40)
    for record in step_records(info)[40:43]:
        recorder.step(record)
    recorder.close()
    assert [record.step for record in read(path)[0]] == list(range(1, 44))


def test_thinned_steps_keep_the_last_one(tmp_path: Path) -> None:
    info, path = run_info(), tmp_path / "run.db"
    recorder = Recorder(path, info)
    feed(recorder, info, last_step=101)
    recorder.close()
    with closing(open_recording(path)) as database:
        thinned = list(read_steps(database, every=10))
    expected = [record for record in step_records(info, 101) if record.step % 10 == 0 or record.step == 101]
    assert repr(thinned) == repr(expected)


def test_a_resume_replaces_the_steps_it_takes_again(tmp_path: Path) -> None:
    path, first, second = tmp_path / "run.db", run_info(), run_info(start_step=46, restarts=1)
    recorder = Recorder(path, first)
    feed(recorder, first, last_step=71)  # interrupted after step 71, its checkpoint is of step 46
    recorder.close()
    again = [replace(record, loss=1000.0 + record.step) for record in step_records(second, 50)]
    recorder = Recorder(path, second)
    for record in again:
        recorder.step(record)
    recorder.close()
    steps, evaluations = read(path)
    assert repr(steps) == repr(step_records(first, 46) + again)
    assert {record.step for record in evaluations} == {23, 46}
    with closing(open_recording(path)) as database:
        assert read_parts(database) == [first, second]
        assert database.execute("SELECT max(step) FROM phases").fetchone()[0] == 50
        assert database.execute("SELECT max(step) FROM evaluation_metrics").fetchone()[0] == 46


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from telemetry_records import run_info, feed
from ddp.telemetry.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), run_info(), interval_seconds=0.05)
feed(recorder, run_info(), last_step=60)
time.sleep(120)
"""


def test_a_killed_run_leaves_a_record_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)])
    try:
        wait_for_steps(path, 60)
    finally:
        child.kill()
        child.wait(timeout=30)
    assert repr(read(path)[0]) == repr(step_records(run_info(), 60))
    resumed = run_info(start_step=46)
    recorder = Recorder(path, resumed)
    feed(recorder, resumed, last_step=48)
    recorder.close()
    assert [record.step for record in read(path)[0]] == list(range(1, 49))


def test_a_locked_database_costs_one_warning_and_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info, path = run_info(), tmp_path / "run.db"
    recorder = Recorder(path, info, interval_seconds=0.05, busy_seconds=0.05)
    feed(recorder, info, last_step=10)
    wait_for_steps(path, 10)
    with closing(sqlite3.connect(path)) as other, caplog.at_level(logging.WARNING):
        other.execute("BEGIN EXCLUSIVE")
        for record in step_records(info, 30)[10:]:
            recorder.step(record)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # several more attempts fail meanwhile
        other.rollback()
    recorder.close()
    assert len(caplog.records) == 1
    assert "locked" in caplog.text
    assert "training goes on" in caplog.text
    assert [record.step for record in read(path)[0]] == list(range(1, 31))


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from telemetry_records import run_info, feed
from ddp.telemetry.recorder import Recorder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
recorder = Recorder(Path(sys.argv[1]), run_info(), interval_seconds=0.01, busy_seconds=0.1)
feed(recorder, run_info(epochs=60))
recorder.close()
print("trained to the end")
"""


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "run.db"), str(Path(__file__).parent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert (done.returncode, done.stdout) == (0, "trained to the end\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr  # why, once; and at the end how many were lost
    assert "incomplete" in lines[0]
    assert "were not written" in lines[1]


def test_a_path_that_cannot_be_opened_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = run_info()
    recorder = Recorder(tmp_path / "nowhere" / "run.db", info, interval_seconds=0.01)
    feed(recorder, info, last_step=23)
    recorder.close()
    assert "No such file or directory" in caplog.text
    assert "25 records of the run were not written" in caplog.text


def test_a_record_that_cannot_be_stored_does_not_hold_up_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info, path = run_info(), tmp_path / "run.db"
    recorder = Recorder(path, info, interval_seconds=0.01)
    recorder.step(replace(step_records(info, 1)[0], examples=object()))  # type: ignore[arg-type]
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.02)
    recorder.step(step_records(info, 2)[1])
    recorder.close()
    assert [record.step for record in read(path)[0]] == [2]


MOUNTS = """/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/fast\\040disk tmpfs rw 0 0
weird /odd fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "mounts", "expected"),
    [
        ("/srv/runs/a/run.db", MOUNTS, "WAL"),
        ("/home/me/runs/run.db", MOUNTS, "TRUNCATE"),
        ("/home/me/fast disk/run.db", MOUNTS, "WAL"),
        ("/homestead/run.db", MOUNTS, "WAL"),
        ("/odd/run.db", MOUNTS, "TRUNCATE"),
        ("/srv/run.db", "", "TRUNCATE"),
    ],
)
def test_a_write_ahead_log_only_on_a_local_filesystem(path: str, mounts: str, expected: str) -> None:
    assert journal_mode(Path(path), mounts) == expected


def test_a_rollback_journal_keeps_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp.telemetry.recording_writer._read_mounts", lambda: "server:/ / nfs4 rw 0 0")
    info, path = run_info(), tmp_path / "run.db"
    recorder = Recorder(path, info, interval_seconds=0.05)
    feed(recorder, info, last_step=40)
    wait_for_steps(path, 40)
    assert not path.with_name("run.db-wal").exists()
    recorder.close()
    assert repr(read(path)[0]) == repr(step_records(info, 40))


def test_what_is_no_record_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no record of a run here"):
        open_recording(tmp_path / "run.db")
    (tmp_path / "text").write_text("certainly not a database, and long enough to be told from one\n" * 20)
    with pytest.raises(UsageError, match="not a database"):
        open_recording(tmp_path / "text")
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty file"):
        open_recording(tmp_path / "empty")
    for version, maker in ((99, "a newer"), (1, "an older")):
        with closing(sqlite3.connect(tmp_path / f"{version}")) as database:
            database.execute(f"PRAGMA user_version = {version}")
        with pytest.raises(UsageError, match=f"versions 3 to 4.: version {version}; read it with {maker} ddp"):
            open_recording(tmp_path / f"{version}")


def test_a_record_of_another_version_is_not_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(tmp_path / "run.db")) as database:
        database.execute("PRAGMA user_version = 1")
    recorder = Recorder(tmp_path / "run.db", run_info(), interval_seconds=0.01)
    feed(recorder, run_info(), last_step=5)
    recorder.close()
    assert "training goes on: its schema is version 1, this program writes 4" in caplog.text
    with closing(sqlite3.connect(tmp_path / "run.db")) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
