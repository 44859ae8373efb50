"""Watching in whole runs: planted faults are named once, healthy ones are not, and what was seen is kept, served and drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddp.errors import JobFileError
from ddp.job import Job, load_job, parse_job
from ddp.tasks.base import Goal, TensorExamples
from ddp.telemetry.layer_record import read_looks, read_pictures
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_events
from ddp.telemetry.records import EvaluationRecord, LayersRecord, RunEvent
from ddp.telemetry.report import write_report
from ddp.telemetry.sinks import Sinks
from ddp.telemetry.summary import History, summary
from ddp.telemetry.warning_sink import WarningSink
from ddp.watching.histogram import Histogram, bins
from ddp.watching.layers import LayerStatistics, WeightPictures
from ranks import RankPool
from telemetry_records import START_UNIX_TIME, evaluation_records, feed, run_info, step_records
from test_metrics import one, scrape
from training_runs import train_ranks

EXAMPLE = Path(__file__).parent.parent / "examples" / "watching.toml"


class Planted:
    """Which quarter of the plane? `fault`: none, dead (a big negative bias before the ReLU), saturated (its tanh)."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def __init__(self, fault: str = "none") -> None:
        self.fault = fault

    def model(self) -> nn.Module:
        first, second = nn.Linear(2, 32), nn.Linear(32, 32)
        with torch.no_grad():
            if self.fault == "dead":
                second.bias.sub_(100.0)
            if self.fault == "saturated":
                first.weight.mul_(1000.0)
        return nn.Sequential(first, nn.Tanh(), second, nn.ReLU(), nn.Linear(32, 4))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        points = torch.randn(1_280, 2, generator=torch.Generator().manual_seed(4))
        labels = (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()
        return TensorExamples(points[:1_024], labels[:1_024]), TensorExamples(points[1_024:], labels[1_024:])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": model(batch[0]).argmax(dim=1) == batch[1]}


def planted_job(folder: Path, fault: str = "none", **optimizer: Any) -> Job:
    return parse_job(
        {
            "run": {"id": "run", "directory": str(folder), "device": "cpu", "threads_per_rank": 1, "epochs": 8},
            "task": {"name": "test_watching_runs:Planted", "options": {"fault": fault}},
            "batch": {"global_batch_size": 64, "micro_batch_size": 32},
            "optimizer": {"name": "adam", "learning_rate": 3e-3, **optimizer},
            "metrics": {"enabled": False},
            "noise_scale": {"enabled": False},
            "watching": {"every": 8},
        }
    )


def warnings_in(run_directory: Path) -> list[str]:
    with closing(open_recording(run_directory / "run.db")) as database:
        return [event.text for event in read_events(database) if event.kind == "warning"]


@pytest.mark.parametrize(
    ("world_size", "fault", "optimizer", "titles"),
    [
        (2, "none", {}, []),
        (1, "dead", {}, ["dead units in 3"]),
        (3, "saturated", {}, ["saturated units in 1"]),
        (2, "none", {"learning_rate": 0.3}, ["updates too large"]),
        (2, "none", {"name": "sgd", "learning_rate": 1e-5}, ["updates too small"]),
    ],
)
def test_a_planted_fault_is_named(
    rank_pool: RankPool, tmp_path: Path, world_size: int, fault: str, optimizer: dict[str, Any], titles: list[str]
) -> None:
    (ended, *_) = train_ranks(rank_pool, world_size, planted_job(tmp_path, fault, **optimizer))
    assert ended.kind == "", ended.message
    told = warnings_in(tmp_path / "run")
    assert [text for text in told if text.startswith(tuple(titles))] if titles else told == []
    assert len(told) == len({text.partition(":")[0] for text in told})
    for text in told:
        assert text in ended.printed.replace("\n", " ")
        assert text.partition(":")[0][1:] in (tmp_path / "run" / "report.html").read_text()


def test_a_healthy_run_of_digits_is_not_talked_about_and_a_resumed_one_says_nothing_twice(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    settings = [f'run.directory="{tmp_path}"', "run.id=run", "run.threads_per_rank=1", "metrics.enabled=false"]
    for epochs, resume in ((3, None), (6, "auto")):
        job = load_job(EXAMPLE, [*settings, f"run.epochs={epochs}"])
        (ended, _) = train_ranks(rank_pool, 2, job, resume=resume)
        assert ended.kind == "", ended.message
    assert warnings_in(tmp_path / "run") == []
    with closing(open_recording(tmp_path / "run" / "run.db")) as database:
        looks, pictures = read_looks(database), read_pictures(database)
    assert [look.step for look in looks] == [1, *range(10, 6 * 23, 10)]
    assert [step for step, _ in pictures] == [1, 130]
    page = (tmp_path / "run" / "report.html").read_text()
    for title in (
        "Update to weight ratio",
        "Histograms of activations",
        "Histograms of gradients",
        "Dead and saturated",
    ):
        assert title in page
    assert "Gap between training and validation" in page and "First layer&#x27;s weights (0), step 130" in page
    assert "data:" not in page and "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")


def histogram(*filled: tuple[int, int], bins_per_octave: int = 1, not_finite: int = 0) -> Histogram:
    counts = [0] * bins(bins_per_octave)
    for place, count in filled:
        counts[place] = count
    return Histogram(bins_per_octave, tuple(counts), not_finite)


def look(step: int, layers: int = 3, ratio: float = 1e-3) -> LayersRecord:
    conv = LayerStatistics(
        "conv0",
        "Conv2d",
        weight_norm=2.0,
        update_norm=2.0 * ratio,
        gradient_norm=0.3,
        gradients=histogram((0, 3), (56, 7), (112, 1), not_finite=2),
        activations=histogram((100, 10), bins_per_octave=4),
        activation_mean=0.1,
        activation_std=math.nan,
    )
    relu = LayerStatistics("relu", "ReLU", "conv0", units=8, dead_units=3, examples=200)
    more = tuple(replace(conv, name=f"conv{number}") for number in range(1, layers))
    values = np.arange(2 * 1 * 3 * 3, dtype="<f4") + step
    pictures = WeightPictures("conv0", (2, 1, 3, 3), 5, values.tobytes())
    return LayersRecord(step, START_UNIX_TIME + step, (conv, relu, *more), pictures, 0.002)


def test_looks_survive_the_round_trip_and_a_resume(tmp_path: Path) -> None:
    path, looks = tmp_path / "run.db", [look(step) for step in (1, 20, 60, 100)]
    for info, told in ((run_info(), looks), (run_info(start_step=50), [look(55, 2)])):
        recorder = Recorder(path, info)
        for each in told:
            recorder.layers(each)
        recorder.close()
    with closing(open_recording(path)) as database:
        found, pictures = read_looks(database), read_pictures(database)
        assert repr(found) == repr([replace(each, pictures=None) for each in [*looks[:2], look(55, 2)]])
        assert pictures == [(1, looks[0].pictures), (55, look(55, 2).pictures)]
        assert [each.step for each in read_looks(database, 2)] == [1, 55]
        (ratio,) = database.execute("SELECT update_ratio FROM layers WHERE step = 20 AND name = 'conv1'").fetchone()
        assert ratio == pytest.approx(1e-3)
        counted = database.execute(
            "SELECT sum(value) FROM layer_histograms, json_each(counts) WHERE step = 20 AND place = 0 AND what = 'gradients'"
        ).fetchone()
        assert tuple(counted) == (11,)


def test_the_record_stays_small_where_every_step_is_watched(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.db", run_info())
    for step in range(1, 1_001):
        recorder.layers(look(step, 1))
    recorder.close()
    with closing(open_recording(tmp_path / "run.db")) as database:
        (kept,) = database.execute("SELECT count(DISTINCT step) FROM layer_histograms").fetchone()
        assert 200 < kept < 600
        assert len(read_looks(database)) == 1_000


def test_a_report_of_odd_layers(tmp_path: Path) -> None:
    """None at all, more than have a row, names that are markup, numbers that are not."""
    info = run_info()
    for name, looks in (("none", []), ("many", [look(step, 40) for step in (1, 2, 3)]), ("odd", [_odd()])):
        (tmp_path / name).mkdir()
        recorder = Recorder(tmp_path / name / "run.db", info)
        feed(recorder, info, 46)
        for each in looks:
            recorder.layers(each)
        recorder.event(RunEvent(40, START_UNIX_TIME, "warning", -1, "dead units in <b>: 3 & more"))
        recorder.close()
        page = write_report(tmp_path / name).read_text()
        assert "Dead units in &lt;b&gt;" in page and "3 &amp; more" in page
        assert ("Histograms of gradients" in page) == (name == "many")


def _odd() -> LayersRecord:
    weird = LayerStatistics("<i>", "X", weight_norm=0.0, update_norm=math.inf, gradients=histogram())
    values = np.full((1, 3, 3, 3), np.nan, dtype="<f4")
    return LayersRecord(1, START_UNIX_TIME, (weird,), WeightPictures("<i>", (1, 3, 3, 3), 1, values.tobytes()))


def test_metrics_have_few_layers(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, run_info())
    assert not any(name.startswith("ddp_update") for name, _ in scrape(registry))
    metrics.layers(look(7, 100))
    samples = scrape(registry)
    assert len([name for name, _ in samples if name == "ddp_update_to_weight_ratio"]) == 32
    assert one(samples, "ddp_update_to_weight_ratio", layer="conv99") == pytest.approx(1e-3)
    assert one(samples, "ddp_dead_units_ratio", layer="relu") == pytest.approx(3 / 8)
    assert one(samples, "ddp_watched_step") == 7
    metrics.event(RunEvent(7, START_UNIX_TIME, "warning", -1, "dead units in relu: all"))
    assert one(scrape(registry), "ddp_events_total", kind="warning") == 1


def test_a_warning_is_said_once_also_after_a_restart_and_in_the_summary() -> None:
    said: list[RunEvent] = []
    info = run_info()
    history = History(info)
    sink = WarningSink(info, said.append)
    for record in step_records(info, 60):
        sink.step(record)
        if record.step % 10 == 0:
            sink.layers(look(record.step, ratio=0.4))
    assert [event.text.partition(":")[0] for event in said] == ["dead units in relu", "updates too large"]
    again = WarningSink(info, said.append)
    again.load_state_dict(sink.state_dict())
    again.recall([], said[:])
    for event in said:
        history.event(event)
    again.layers(look(70, ratio=0.4))
    again.layers(look(80, ratio=0.4))
    assert len(said) == 2
    assert re.search(r"^warning +step 10: dead units in relu: ", summary(info, history), re.MULTILINE)


def test_a_run_as_it_should_be_goes_without_a_word() -> None:
    said: list[RunEvent] = []
    sink = WarningSink(run_info(), said.append)
    feed(Sinks([sink]), run_info())
    assert said == []
    sink.event(RunEvent(100, START_UNIX_TIME, "rolled_back", -1, "went back"))
    for record in _overfitted():
        sink.evaluation(record)
    assert [event.text.partition(":")[0] for event in said] == ["large gap between training and validation"]
    told, resumed = list(said), WarningSink(run_info(), said.append)
    resumed.recall(_overfitted()[:-1], [])
    assert said == told  # of what earlier parts saw nothing is said
    resumed.evaluation(_overfitted()[-1])
    assert len(said) == 2


def _overfitted() -> list[EvaluationRecord]:
    records = evaluation_records(run_info(start_step=230))
    return [replace(each, metrics={"accuracy": 0.6}) if each.split == "validation" else each for each in records]


def test_keys_are_checked() -> None:
    table = planted_job(Path("runs")).model_dump(exclude_none=True)
    for key, value, told in (
        ("evry", 3, "did you mean every"),
        ("every", 0, "watching.every"),
        ("bins_per_octave", 3, "watching.bins_per_octave"),
    ):
        with pytest.raises(JobFileError, match=told):
            parse_job({**table, "watching": {key: value}})
