"""What the report draws of the new columns and of recorded parameters is what the record holds."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ddp.telemetry.parameter_charts import parameter_charts
from ddp.telemetry.recorded_parameters import MOST_ENTRIES, MOST_PARAMETERS, MOST_STEPS, read_trajectories
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording
from ddp.telemetry.records import ParameterEntries, ParametersRecord, StepRecord
from ddp.telemetry.report import write_report
from telemetry_records import evaluation_records, run_info, step_records

STEPS = 46


def write(folder: Path, steps: list[StepRecord], parameters: list[ParametersRecord], penalty: float = 0.0) -> Path:
    recorder = Recorder(folder / "run.db", run_info())
    for step in steps:
        recorder.step(step)
    for evaluation in evaluation_records(run_info(), STEPS):
        recorder.evaluation(replace(evaluation, penalty=penalty))
    for record in parameters:
        recorder.parameters(record)
    recorder.close()
    return folder


def entries(name: str, step: int, count: int, gradient: float = 0.5) -> ParameterEntries:
    places = tuple(range(0, 3 * count, 3))
    return ParameterEntries(
        name, (3 * count,), places, tuple(step + place / 100 for place in places), (gradient * step,) * count
    )


def test_the_report_draws_what_was_recorded(tmp_path: Path) -> None:
    steps = [replace(step, momentum=step.step / 100, metric=0.5) for step in step_records(run_info(), STEPS)]
    recorded = [ParametersRecord(step, (entries("0.<weight>", step, 4),)) for step in range(1, STEPS + 1)]
    page = write_report(write(tmp_path, steps, recorded, penalty=0.25)).read_text()
    for said in ("Recorded parameters", "Gradients of recorded parameters", "0.&lt;weight&gt;", "<h2>Momentum</h2>"):
        assert said in page
    assert "training steps, running mean" in page
    assert "validation with weight decay&#x27;s penalty" in page


def test_a_report_without_them_is_as_it_was(tmp_path: Path) -> None:
    page = write_report(write(tmp_path, step_records(run_info(), STEPS), [])).read_text()
    for name in ("ecorded parameters", "Momentum", "penalty", "running mean</li><li>training steps"):
        assert name not in page


def test_many_parameters_entries_and_steps_are_thinned(tmp_path: Path) -> None:
    steps = step_records(run_info(epochs=60), 1_200)
    recorded = [
        ParametersRecord(step.step, tuple(entries(f"{number}.weight", step.step, 20) for number in range(9)))
        for step in steps
    ]
    with closing(open_recording(write(tmp_path, steps, recorded) / "run.db")) as database:
        found = read_trajectories(database)
    assert [each.parameter for each in found] == [
        f"{n}.weight" for n in range(MOST_PARAMETERS) for _ in range(MOST_ENTRIES)
    ]
    assert MOST_STEPS / 2 <= len(found[0].epochs) <= MOST_STEPS + 1
    for each in found:
        assert list(each.values) == [round(23 * epoch) + each.place / 100 for epoch in each.epochs]


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    """No gradient at all; and entries that came with a resume."""
    steps = step_records(run_info(), STEPS)
    recorded = [ParametersRecord(step, (entries("a", step, 4, math.nan),)) for step in range(1, 20)]
    with closing(open_recording(write(tmp_path, steps, recorded) / "run.db")) as database:
        (chart,) = parameter_charts(read_trajectories(database))
    assert chart.title == "Recorded parameters"
    recorder = Recorder(tmp_path / "run.db", run_info(start_step=19))
    for step in range(20, 30):
        recorder.parameters(ParametersRecord(step, (entries("a", step, 6),)))
    for record in steps[19:]:
        recorder.step(record)
    recorder.close()
    with closing(open_recording(tmp_path / "run.db")) as database:
        assert len(parameter_charts(read_trajectories(database))) == 2
