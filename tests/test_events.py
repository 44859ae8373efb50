"""What happened to a run: kept, told, counted; and what a roll-back makes void is gone everywhere."""

from __future__ import annotations

import io
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from ddp.telemetry.metrics import Metrics
from ddp.telemetry.progress import Progress
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_batch_changes, read_evaluations, read_events, read_steps
from ddp.telemetry.records import EventKind, RunEvent, Sink
from ddp.telemetry.report import write_report
from ddp.telemetry.summary import History, summary
from telemetry_records import (
    START_UNIX_TIME,
    adam_steps,
    batch_changes,
    evaluation_records,
    feed,
    run_info,
    step_records,
)
from test_metrics import one, scrape

NAN = math.nan


def event(step: int, kind: EventKind, rank: int = -1, text: str = "", duration: float = NAN) -> RunEvent:
    return RunEvent(step, START_UNIX_TIME + step, kind, rank, text or f"{kind} it is", duration, duration / 100)


EVENTS = [
    event(40, "saved", duration=1.5),
    event(57, "not_finite", rank=1),
    event(46, "rolled_back"),
    event(60, "save_failed", duration=0.25),
]


def _recorded(path: Path) -> list[RunEvent]:
    with closing(open_recording(path)) as database:
        return read_events(database)


def test_events_survive_the_round_trip_and_a_resume(tmp_path: Path) -> None:
    """Also those of steps that the resume takes again: they say why there was one."""
    path, later = tmp_path / "run.db", event(52, "replicas_differ", 1)
    for info, told in ((run_info(), EVENTS), (run_info(start_step=46, restarts=1), [later])):
        recorder = Recorder(path, info)
        for each in told:
            recorder.event(each)
        recorder.close()
    assert repr(_recorded(path)) == repr([*EVENTS, later])


def _feed_with_a_roll_back(sink: Sink) -> None:
    """To step 71, back to 46, and again to the end of the third epoch with other losses."""
    info = run_info()
    for change in batch_changes(info):
        sink.batch_change(replace(change, step=change.step - 46))  # after the steps 0 and 69
    for record in adam_steps(info, 71):
        sink.step(record)
    for record in evaluation_records(info, 71):
        sink.evaluation(replace(record, metrics={"accuracy": 0.99 if record.step == 69 else 0.5}))
    sink.event(event(71, "not_finite", 1))
    sink.event(event(46, "rolled_back", text="back from step 71 to the checkpoint of step 46"))
    for record in step_records(info, 60)[46:]:
        sink.step(replace(record, loss=record.loss + 1.0))


def test_a_roll_back_replaces_what_it_went_behind_in_the_record(tmp_path: Path) -> None:
    path, info = tmp_path / "run.db", run_info()
    recorder = Recorder(path, info)
    _feed_with_a_roll_back(recorder)
    recorder.close()
    with closing(open_recording(path)) as database:
        steps, evaluations = list(read_steps(database)), read_evaluations(database)
        assert [each.step for each in read_batch_changes(database)] == [0]
    assert [record.step for record in steps] == list(range(1, 61))
    assert {record.step for record in evaluations} == {23, 46}
    expected = [replace(record, loss=record.loss + 1.0) for record in step_records(info, 60)[46:]]
    assert repr(steps[46:]) == repr(expected)  # their readings too
    assert [each.kind for each in _recorded(path)] == ["not_finite", "rolled_back"]


def test_a_roll_back_undoes_the_history() -> None:
    history = History(run_info())
    _feed_with_a_roll_back(history)
    straight = History(run_info())
    for record in [*adam_steps(run_info(), 46), *step_records(run_info(), 60)[46:]]:
        straight.step(record)
    assert history.target_reached is None and history.at_target is None
    assert history.validation is not None and history.validation.step == 46
    assert [timed.step for timed in history.readings] == list(range(1, 61))
    assert repr(history.readings) == repr(straight.readings)
    assert repr(history.latest_resolved) == repr(straight.latest_resolved)
    assert [each.kind for each in history.events] == ["not_finite", "rolled_back"]
    assert "60 steps" in summary(run_info(), history)


def test_just_after_a_roll_back_nothing_of_later_steps_is_left() -> None:
    info, history = run_info(), History(run_info())
    for change in batch_changes(info):
        history.batch_change(change)
    for record in step_records(info, 150):
        history.step(record)
    history.event(event(100, "rolled_back"))
    assert history.last is None
    assert history.latest is not None and history.latest.step <= 100
    assert history.advised is not None and history.advised.step <= 100
    assert [change.step for change in history.changes] == [46]
    assert history.global_batch_size == batch_changes(info)[0].after
    summary(info, history)
    history.event(event(0, "rolled_back"))
    assert (history.latest, history.latest_resolved, history.readings) == (None, None, [])
    assert history.global_batch_size == info.global_batch_size


def test_the_progress_line_tells_all_but_saves_that_went_well() -> None:
    stream = io.StringIO()
    progress = Progress(run_info(), stream, interval_seconds=math.inf)
    for each in EVENTS:
        progress.event(each)
    assert stream.getvalue().splitlines() == [
        "step 57: not_finite it is",
        "step 46: rolled_back it is",
        "step 60: save_failed it is",
    ]


def test_a_roll_back_takes_the_evaluation_out_of_the_progress_line() -> None:
    info, stream = run_info(), io.StringIO()
    progress = Progress(info, stream, interval_seconds=0.0)
    feed(progress, info, 69)
    progress.event(event(46, "rolled_back"))
    progress.step(step_records(info, 47)[-1])
    assert "accuracy" not in stream.getvalue().splitlines()[-1]


def test_metrics_count_events_and_show_how_saving_goes() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, run_info())
    samples = scrape(registry)
    assert one(samples, "ddp_events_total", kind="replicas_differ") == 0  # there before it happens, for increase()
    assert ("ddp_checkpoint_last_saved_step", ()) not in samples
    for each in [*EVENTS, event(70, "save_failed"), event(57, "not_finite", 1)]:
        metrics.event(each)
    samples = scrape(registry)
    counts = {"saved": 1, "not_finite": 2, "rolled_back": 1, "save_failed": 2, "straggler": 0}
    assert {kind: one(samples, "ddp_events_total", kind=kind) for kind in counts} == counts
    assert one(samples, "ddp_checkpoint_last_saved_step") == 40
    assert one(samples, "ddp_checkpoint_last_saved_timestamp_seconds") == START_UNIX_TIME + 40
    assert one(samples, "ddp_checkpoint_save_seconds_total") == 1.75
    assert one(samples, "ddp_checkpoint_stall_seconds_total") == pytest.approx(0.0175)
    assert one(samples, "ddp_checkpoint_failures_in_a_row") == 2
    metrics.event(event(80, "saved"))
    assert one(scrape(registry), "ddp_checkpoint_failures_in_a_row") == 0


def test_metrics_forget_evaluations_that_a_roll_back_went_behind() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics = Metrics(registry, info)
    feed(metrics, info, 69)
    metrics.event(event(46, "rolled_back"))
    assert ("ddp_loss", (("split", "validation"),)) not in scrape(registry)


def test_the_report_has_a_table_of_them_and_a_card_for_saves(tmp_path: Path) -> None:
    info = run_info()
    recorder = Recorder(tmp_path / "run.db", info)
    feed(recorder, info, 69)
    for each in [*EVENTS, *(event(80 + number, "straggler", 1, f"<slow> {number}") for number in range(60))]:
        recorder.event(each)
    recorder.close()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "What happened to the run, the latest 50 of 63" in text
    assert "&lt;slow&gt; 59" in text and "&lt;slow&gt; 9<" not in text
    assert "Checkpoints saved" in text and "the newest of step 40; 1.5 s each; 1 failed" in text
