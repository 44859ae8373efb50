"""Time of steps that count, each once, over all time: against sums by hand, after restarts and roll-backs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from ddp.job import MetricsSection
from ddp.telemetry.goodput import Goodput
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_times
from ddp.telemetry.records import RunEvent, RunInfo, StepRecord
from ddp.telemetry.station import Station
from telemetry_records import START_UNIX_TIME, run_info, step_records
from test_metrics import one, scrape


def seconds_of(records: Sequence[StepRecord]) -> float:
    return sum(record.duration_seconds for record in records)


def rolled_back(step: int) -> RunEvent:
    return RunEvent(step, START_UNIX_TIME, "rolled_back", -1, f"back to step {step}")


def test_steps_count_and_all_else_does_not() -> None:
    records, goodput = step_records(run_info(), 50), Goodput(1_000.0)
    for record in records:
        goodput.step(record)
    assert goodput.ratio(1_010.0) == pytest.approx(seconds_of(records) / 10.0)
    assert goodput.ratio(1_000.0) == goodput.ratio(900.0) == 0.0  # no time has passed, or a clock was set
    assert goodput.ratio(1_000.001) == 1.0


@pytest.mark.parametrize("order", ["event", "state", "event, state", "state, event"])
def test_steps_that_a_roll_back_takes_again_count_once(order: str) -> None:
    """Whether the checkpoint's state is loaded, or the event told, or both, in either order."""
    records, goodput = step_records(run_info(), 50), Goodput(1_000.0)
    for record in records[:30]:
        goodput.step(record)
    state = goodput.state_dict()
    for record in records[30:]:
        goodput.step(record)
    for what in order.split(", "):
        if what == "event":
            goodput.event(rolled_back(30))
        else:
            goodput.load_state_dict(state)
    assert goodput.steps == 30
    again = [replace(record, duration_seconds=0.5) for record in records[30:40]]
    for record in again:
        goodput.step(record)
    assert goodput.productive_seconds == pytest.approx(seconds_of(records[:30]) + 5.0)


def test_a_restart_goes_on_from_the_checkpoint_and_counts_the_time_it_was_down() -> None:
    first, second = Goodput(1_000.0), Goodput(1_500.0)
    for record in step_records(run_info(), 20):
        first.step(record)
    second.load_state_dict(first.state_dict())
    assert second.began_unix_time == 1_000.0
    assert second.ratio(1_600.0) == pytest.approx(first.productive_seconds / 600.0)


def _record(path: Path, info: RunInfo, records: Sequence[StepRecord]) -> None:
    recorder = Recorder(path, info)
    for record in records:
        recorder.step(record)
    recorder.close()


def test_the_record_knows_the_times_of_all_parts(tmp_path: Path) -> None:
    path, records = tmp_path / "run.db", step_records(run_info(), 60)
    _record(path, run_info(), records[:50])
    with closing(open_recording(path)) as database:
        (began,) = database.execute("SELECT started_unix_time FROM run").fetchone()
    again = [replace(record, unix_time=began + 100.0 + record.step) for record in records[40:]]
    _record(path, run_info(start_step=40, restarts=1), again)
    with closing(open_recording(path)) as database:
        times, until = read_times(database), read_times(database, 40)
    assert times is not None and until is not None
    assert times[:2] == (began, began + 160.0)
    assert times[2] == pytest.approx(seconds_of(records))
    assert until[2] == pytest.approx(seconds_of(records[:40]))


@pytest.mark.parametrize("start_step", [0, 40], ids=["before its first checkpoint", "from a checkpoint"])
def test_a_part_that_died_is_recalled_from_the_record(tmp_path: Path, start_step: int) -> None:
    """Also where no checkpoint was saved: the run began when its first part did."""
    records = step_records(run_info(), 50)
    _record(tmp_path / "run.db", run_info(), records)
    with closing(open_recording(tmp_path / "run.db")) as database:
        (began,) = database.execute("SELECT started_unix_time FROM run").fetchone()

    station = Station(MetricsSection(enabled=False), run_info(start_step=start_step, restarts=1))
    try:
        station.open(tmp_path)
        assert station.goodput.began_unix_time == began
        assert station.goodput.productive_seconds == pytest.approx(seconds_of(records[:start_step]))
        for record in records[start_step:]:
            station.sinks.step(record)
        (line,) = [line for line in station.finish().splitlines() if line.startswith("goodput")]
    finally:
        station.close()
    assert "% of 0:0" in line and "went into steps that count; 1 interruption" in line


def test_a_run_without_interruption_has_no_line_for_it(tmp_path: Path) -> None:

    station = Station(MetricsSection(enabled=False), run_info())
    try:
        station.open(tmp_path)
        for record in step_records(run_info(), 30):
            station.sinks.step(record)
        assert "goodput" not in station.finish()
        assert "Goodput" in (tmp_path / "report.html").read_text(encoding="utf-8")
    finally:
        station.close()


def test_prometheus_sees_it_now_and_not_as_of_the_latest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, goodput = CollectorRegistry(), Goodput(1_000.0)
    Metrics(registry, run_info(), goodput=goodput)
    goodput.step(replace(step_records(run_info(), 1)[0], duration_seconds=5.0))
    for now, ratio in ((1_010.0, 0.5), (1_020.0, 0.25)):
        monkeypatch.setattr("ddp.telemetry.metrics.time.time", lambda now=now: now)
        assert one(scrape(registry), "ddp_goodput_ratio") == ratio
    assert one(scrape(registry), "ddp_run_began_timestamp_seconds") == 1_000.0
