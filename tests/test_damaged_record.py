"""Records with a value that is none: each reader of `run.db` refuses them in one line, and a resumed run goes on without."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ddp.diagnostics.advise import Question, advise
from ddp.errors import UsageError
from ddp.job import MetricsSection
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.records import RunEvent
from ddp.telemetry.report import write_report
from ddp.telemetry.station import Station
from telemetry_records import adam_steps, batch_changes, evaluation_records, run_info

STEPS = 60
OF_STEPS = (
    *(
        "steps SET epoch = 'x'",
        "steps SET loss = 'x'",
        "steps SET examples = 'x'",
        "steps SET global_batch_size = x'00'",
    ),
    *("steps SET unix_time = 'x' WHERE step = 60", "steps SET duration_seconds = x'ff'", "steps SET examples = 1.5"),
    *(
        "steps SET method = 'x'",
        "readings SET state = 'x'",
        "readings SET noise_scale = 'x'",
        "readings SET window = 'x'",
    ),
    *("run SET world_size = 'x'", "run SET epochs = 'x'", "run SET target = 'x'", "phases SET data_seconds = 'x'"),
)
OF_OTHERS = (
    *(
        "run SET started_unix_time = 'z'",
        "events SET unix_time = 'y'",
        "events SET step = 'x'",
        "events SET rank = 'x'",
    ),
    *("evaluations SET loss = 'x'", "evaluation_metrics SET value = 'x'", "batch_changes SET before = 'x'"),
)
OF_THE_PAGE = ("events SET unix_time = 1e300", "events SET text = x'00'")  # what can be read, and not be shown


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    info, path = run_info(), tmp_path_factory.mktemp("whole") / "run.db"
    recorder = Recorder(path, info)
    for step in adam_steps(info, STEPS):
        recorder.step(step)
    for evaluation in evaluation_records(info):
        recorder.evaluation(evaluation)
    for batch in batch_changes(info):
        recorder.batch_change(batch)
    recorder.event(RunEvent(30, 1_760_000_030.0, "not_finite", 1, "a gradient is not finite"))
    recorder.close()
    return path


def _damaged(whole: Path, folder: Path, change: str) -> Path:
    shutil.copy(whole, folder / "run.db")
    with closing(sqlite3.connect(folder / "run.db")) as database, database:
        assert database.execute(f"UPDATE {change}").rowcount > 0
    return folder


@pytest.mark.parametrize("change", [*OF_STEPS, *OF_OTHERS, *OF_THE_PAGE])
def test_a_report_refuses_it(whole: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(UsageError, match="run.db: cannot read the record of the run"):
        write_report(_damaged(whole, tmp_path, change))


@pytest.mark.parametrize("change", OF_STEPS)
def test_advice_refuses_it(whole: Path, tmp_path: Path, change: str) -> None:
    try:
        advise(_damaged(whole, tmp_path, change), Question(memory=None))
    except UsageError as error:
        assert "run.db: cannot read the record of the run" in str(error)
    else:
        pytest.fail("it was read")


@pytest.mark.parametrize("change", [*OF_STEPS, *OF_OTHERS])
def test_a_resumed_run_goes_on_without_it(
    whole: Path, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    info = run_info(start_step=STEPS, restarts=1)
    station = Station(MetricsSection(enabled=False), info)
    try:
        station.open(_damaged(whole, tmp_path, change))
        assert "the summary will not know the steps before this part" in caplog.text
        assert list(station._history.events) == [] and station._history.last is None
        for step in adam_steps(info, STEPS + 5):
            station.sinks.step(step)
        assert "65 steps" in station.finish()
    finally:
        station.close()
