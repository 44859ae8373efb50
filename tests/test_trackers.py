"""What trackers are told of a run, read back by their own libraries."""

from __future__ import annotations

import json
import struct
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp.errors import JobFileError, UsageError
from ddp.job import MetricsSection, parse_job
from ddp.telemetry.records import RunEvent, RunInfo
from ddp.telemetry.station import Station
from ddp.telemetry.trackers.environment import mlflow_uri, tracker_environment
from ddp.telemetry.trackers.group import Trackers, check_trackers
from ddp.telemetry.trackers.scalars import scalars
from ddp.training.run_directory import changed_settings
from jobs import wait_until
from telemetry_records import START_UNIX_TIME, feed, run_info, step_records
from tracking import EVERY, SETTINGS, processes_in, read_steps, section, tell

pytestmark = pytest.mark.usefixtures("no_credentials")

TOLD_STEPS = [1, *range(EVERY, 71, EVERY)]


def loss_at(step: int, info: RunInfo | None = None) -> float:
    return step_records(info or run_info(), step)[-1].loss


def test_all_three_hear_a_run_and_its_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Interrupted after step 70, gone on with from step 46: one run in each of them, as its own library reads it."""
    chosen = section("tensorboard", "mlflow", "wandb")
    tell(tmp_path, chosen, run_info(), 70)
    tell(tmp_path, chosen, run_info(start_step=46, restarts=1), 60)
    assert caplog.messages == []
    folder = tmp_path / "trackers"
    resumed = [1, 10, 20, 30, 40, 50, 60]
    assert _read_tensorboard(folder / "tensorboard") == resumed
    _check_mlflow(folder / "mlflow")
    _check_wandb(folder / "wandb")
    assert list((tmp_path / "home").iterdir()) == []
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert all(not each.stat().st_mode & 0o077 for each in folder.rglob("*") if not each.is_symlink())
    wait_until(lambda: not processes_in(tmp_path))


def _read_tensorboard(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    assert {"training/loss", "training/learning_rate", "validation/accuracy", "validation/loss"} <= set(
        read.Tags()["scalars"]
    )
    losses = {each.step: each.value for each in read.Scalars("training/loss")}
    for step, loss in losses.items():
        info = run_info(start_step=46) if step > 46 else run_info()
        assert loss == pytest.approx(loss_at(step, info), rel=1e-6)
    assert [each.step for each in read.Scalars("validation/loss")] == [23, 46]
    assert read.Scalars("training/loss")[0].wall_time == START_UNIX_TIME + 0.02
    assert b"threads_per_rank" in read.Tensors("job")[0].tensor_proto.string_val[0]
    return list(losses)


def _check_mlflow(folder: Path) -> None:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        client = MlflowClient(folder.as_uri())
        experiment = client.get_experiment_by_name("ddp")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "training/loss")
        accuracies = client.get_metric_history(run.info.run_id, "validation/accuracy")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "digits-1")
    assert run.data.params == {
        "optimizer.name": "adam",
        "run.threads_per_rank": "2",
        "task.options.a_b": "[1.5, 'Infinity']",
    }
    assert [each.step for each in history] == [*TOLD_STEPS, 50, 60]  # MLflow forgets nothing
    assert [each.value for each in history[: len(TOLD_STEPS)]] == [pytest.approx(loss_at(step)) for step in TOLD_STEPS]
    assert [each.step for each in accuracies] == [23, 46, 69]


def _check_wandb(folder: Path) -> None:
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # a run's id, gone on with
    told = [each for file in files for each in _wandb_history(file)]
    assert [each["step"] for each in told if "training/loss" in each] == [*TOLD_STEPS, 50, 60]
    assert [each["training/loss"] for each in told if "training/loss" in each][:8] == [
        pytest.approx(loss_at(step)) for step in TOLD_STEPS
    ]


def _wandb_history(file: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2

    found: list[dict[str, Any]] = []
    for data in _wandb_records(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """wandb's own reader is a Go program; the format is LevelDB's log: blocks of 32 KiB of chunks, after seven bytes."""
    assert content.startswith(b":W&B")
    position, whole = 7, b""
    while position + 7 <= len(content):
        if (left := 32_768 - position % 32_768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last piece
            yield whole
            whole = b""


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("sqlite:///some/mlflow.db", "sqlite:///{here}/some/mlflow.db"),
        ("file:mlruns", "file:{here}/mlruns"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("file:///tmp/mlruns", "file:///tmp/mlruns"),
        ("https://mlflow.example/a", "https://mlflow.example/a"),
    ],
)
def test_a_store_of_many_runs_is_where_they_are_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, meant: str
) -> None:
    """MLflow's process works in the run's own folder, where a relative path would be a store of that run alone."""
    monkeypatch.chdir(tmp_path)
    folder, meant = tmp_path / "runs" / "a", meant.format(here=tmp_path)
    assert mlflow_uri(section("mlflow", mlflow_uri=named), folder, {}) == meant
    known = {"MLFLOW_TRACKING_URI": named, "MLFLOW_TRACKING_TOKEN": "t"}
    environment = tracker_environment("mlflow", section("mlflow"), folder, known)
    assert (environment["MLFLOW_TRACKING_URI"], environment["MLFLOW_TRACKING_TOKEN"]) == (meant, "t")


def test_a_roll_back_takes_steps_out_of_tensorboard(tmp_path: Path) -> None:
    trackers = Trackers(section("tensorboard"), run_info(), SETTINGS, tmp_path)
    feed(trackers, run_info(), 70)
    trackers.event(RunEvent(30, START_UNIX_TIME, "rolled_back", -1, "went back"))
    for record in step_records(run_info(start_step=30), 50):
        trackers.step(record)
    trackers.close()
    assert read_steps(tmp_path / "trackers" / "tensorboard") == [1, 10, 20, 30, 40, 50]


def test_a_tracker_that_is_not_installed_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in (("tensorboard", "tracking"), ("mlflow", "mlflow"), ("wandb", "wandb")):
        with pytest.raises(
            UsageError, match=rf"trackers.names: {name} is not installed: pip install -e '.\[{extra}\]'"
        ):
            check_trackers(section(name))
    with pytest.raises(UsageError, match="not installed"):
        Station(MetricsSection(enabled=False), run_info(), trackers=section("wandb"))


def test_the_names_of_numbers() -> None:
    step: dict[str, Any] = {
        "kind": "step",
        "step": 3,
        "loss": 0.5,
        "metric": 0.25,
        "noise_scale": "Infinity",
        "momentum": None,
    }
    found = scalars(step, "accuracy")
    assert found["training/loss"] == 0.5 and found["training/accuracy"] == 0.25
    assert found["training/noise_scale"] == float("inf") and "training/momentum" not in found
    evaluation = {
        "kind": "evaluation",
        "split": "validation, averaged weights",
        "loss": 1.0,
        "penalty": None,
        "metrics": {"a@5": 1},
    }
    assert scalars(evaluation, "accuracy") == {
        "validation_ averaged weights/loss": 1.0,
        "validation_ averaged weights/a_5": 1.0,
    }
    assert scalars({"kind": "event"}, "accuracy") == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('names = ["tensorbord"]', r"trackers.names.0: 'tensorbord' is not valid \(did you mean tensorboard\?\)"),
        ('names = ["wandb", "wandb"]', "trackers.names: a tracker is named twice"),
        ("names = 3", "trackers.names: should be"),
        ('mlflow_uri = "https://me:secret@host"', "trackers.mlflow_uri: a password does not belong into a job file"),
        ('mlflow_uri = "databricks"', "an address begins with one of http:, https:, file:, sqlite:"),
        ('project = "a/b"', "trackers.project"),
        ("every_steps = 0", "trackers.every_steps"),
        ("patience_seconds = -1.0", "trackers.patience_seconds"),
        ("patience_seconds = inf", "trackers.patience_seconds"),
        ('uri = "http://x"', "trackers.uri: unknown key.* valid: names, project"),
    ],
)
def test_the_job_file_is_checked(line: str, said: str) -> None:
    table: dict[str, Any] = {
        "run": {"steps": 1},
        "task": {"name": "digits"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 8},
        "trackers": tomllib.loads(line),
    }
    with pytest.raises(JobFileError, match=said) as caught:
        parse_job(table)
    assert "secret" not in str(caught.value)


def test_trackers_may_change_in_a_resumed_run() -> None:
    table: dict[str, Any] = {
        "run": {"steps": 1},
        "task": {"name": "digits"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 8},
    }
    other = table | {"trackers": {"names": ["wandb"]}, "record": {"parameters": ["*"]}}
    assert changed_settings(parse_job(table), parse_job(other)) == []
    assert parse_job(tomllib.loads(parse_job(other).to_toml())) == parse_job(other)
