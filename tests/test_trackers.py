"""Trackers hear of a run, or do not, and the run goes on: read back by their own libraries, and on real sockets."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp.errors import JobFileError, UsageError
from ddp.job import MetricsSection, TrackersSection, parse_job, redact
from ddp.telemetry.records import RunEvent, RunInfo
from ddp.telemetry.station import Station
from ddp.telemetry.trackers import tracker as tracker_module
from ddp.telemetry.trackers.environment import tracker_environment
from ddp.telemetry.trackers.group import Trackers, check_trackers
from ddp.telemetry.trackers.scalars import scalars
from ddp.training.run_directory import changed_settings
from jobs import started, wait_until, write_job
from ranks import RankPool
from telemetry_records import START_UNIX_TIME, feed, run_info, step_records
from training_runs import job, train_ranks

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")
pytest.importorskip("wandb")

SETTINGS = {"optimizer.name": "adam", "run.threads_per_rank": 2, "task.options.a:b": [1.5, float("inf")]}
EVERY = 10
MUTE_PATIENCE = 1.0  # seconds, for what never answers
TOLD_STEPS = [1, *range(EVERY, 71, EVERY)]


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def section(*names: str, **settings: Any) -> TrackersSection:
    return TrackersSection.model_validate(
        {"names": list(names), "every_steps": EVERY, "wandb_offline": True, "patience_seconds": 60.0, **settings}
    )


def tell(folder: Path, chosen: TrackersSection, info: RunInfo, last_step: int) -> None:
    """All of a part of a run, to its end."""
    trackers = Trackers(chosen, info, SETTINGS, folder)
    feed(trackers, info, last_step)
    trackers.close()
    trackers.close()


def processes_in(folder: Path) -> list[int]:
    """Those whose working directory is there, which is where a tracker's own and what it starts work."""
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(each)).is_relative_to(folder.resolve()):
                found.append(int(each.parent.name))
    return found


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


def test_a_roll_back_takes_steps_out_of_tensorboard(tmp_path: Path) -> None:
    trackers = Trackers(section("tensorboard"), run_info(), SETTINGS, tmp_path)
    feed(trackers, run_info(), 70)
    trackers.event(RunEvent(30, START_UNIX_TIME, "rolled_back", -1, "went back"))
    for record in step_records(run_info(start_step=30), 50):
        trackers.step(record)
    trackers.close()
    assert _read_steps(tmp_path / "trackers" / "tensorboard") == [1, 10, 20, 30, 40, 50]


def _read_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [each.step for each in read.Scalars("training/loss")]


def test_a_process_that_is_killed_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module, "FIRST_PAUSE_SECONDS", 0.1)
    trackers = Trackers(section("tensorboard"), run_info(), SETTINGS, tmp_path)
    steps = step_records(run_info(), 60)
    for record in steps[:30]:
        trackers.step(record)
    folder = tmp_path / "trackers" / "tensorboard"
    wait_until(lambda: list(folder.glob("events*")) and _has_steps(folder, 4))
    (process,) = processes_in(tmp_path)
    os.kill(process, signal.SIGKILL)
    for record in steps[30:]:
        trackers.step(record)
    trackers.close()
    assert _read_steps(folder) == [1, 10, 20, 30, 40, 50, 60]
    assert caplog.messages == [
        "tensorboard cannot be told of the run, training goes on: its process ended with code -9"
    ]


def _has_steps(folder: Path, count: int) -> bool:
    try:
        return len(_read_steps(folder)) >= count
    except KeyError:
        return False


class Server:
    """On a port of loopback: mute (takes connections and says nothing), or answering every request with `code`."""

    def __init__(self, code: int | None = None) -> None:
        self.authorizations: list[str | None] = []
        self.requests = 0
        if code is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            self.port, self._server = self._listener.getsockname()[1], None
            return
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                outer.requests += 1
                outer.authorizations.append(self.headers.get("Authorization"))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps(_mlflow_answer(self.path) if code == 200 else {"error": "out of order"}).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = _answer  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """From now on connections are refused."""
        if self._server is None:
            self._listener.close()
        else:
            self._server.shutdown()
            self._server.server_close()


def _mlflow_answer(path: str) -> dict[str, Any]:
    """Enough of MLflow's REST interface for a run to be told of."""
    if "experiments/get-by-name" in path:
        return {"experiment": {"experiment_id": "1", "name": "ddp", "lifecycle_stage": "active"}}
    if "runs/create" in path or "runs/update" in path:
        info = {"run_id": "a" * 32, "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        return {"run": {"info": info, "data": {}}, "run_info": info}
    return {}


@pytest.fixture
def servers() -> Iterator[Any]:
    made: list[Server] = []

    def make(code: int | None = None) -> Server:
        made.append(Server(code))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(OSError):
            each.close()


def test_servers_that_never_answer_hold_nothing_up(
    tmp_path: Path, servers: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both take the connection and hang; what has no room is dropped and counted; their processes are gone at the end."""
    monkeypatch.setattr(tracker_module, "QUEUE_LENGTH", 50)
    mute = servers()
    monkeypatch.setenv("WANDB_BASE_URL", mute.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    chosen = section(
        "mlflow", "wandb", mlflow_uri=mute.url, every_steps=1, wandb_offline=False, patience_seconds=MUTE_PATIENCE
    )
    trackers = Trackers(chosen, run_info(), SETTINGS, tmp_path)
    for record in step_records(run_info(), 200):
        trackers.step(record)
    wait_until(lambda: len(processes_in(tmp_path)) >= 2)
    trackers.close()
    wait_until(lambda: not processes_in(tmp_path))
    assert sorted(caplog.messages) == [
        f"{name} {what}"
        for name in ("mlflow", "wandb")
        for what in (
            "200 records of the run did not reach it",
            "does not keep up with the run: records are dropped, training goes on",
        )
    ]


def test_a_server_out_of_order_and_one_that_wants_a_login(
    tmp_path: Path, servers: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = servers(500)
    monkeypatch.setenv("WANDB_BASE_URL", broken.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    chosen = section("mlflow", "wandb", mlflow_uri=broken.url, wandb_offline=False)
    tell(tmp_path, chosen, run_info(), 30)
    said = sorted(caplog.messages)
    assert len(said) == 4, said  # why, once each; and how much was lost
    assert said[0] == "mlflow 6 records of the run did not reach it"
    assert said[1].startswith("mlflow cannot be told of the run, training goes on: ") and "500" in said[1]
    assert said[3].startswith("wandb cannot be told of the run, training goes on: ") and "wandb login" in said[3]
    assert broken.requests > 0


def test_a_server_that_dies_in_mid_run(
    tmp_path: Path, servers: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was told is told; then one line; and credentials go where the environment says."""
    server = servers(200)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token-of-mine")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trackers = Trackers(section("mlflow"), run_info(), SETTINGS, tmp_path)
    steps = step_records(run_info(), 40)
    for record in steps[:20]:
        trackers.step(record)
    wait_until(lambda: server.requests >= 5)  # experiment, run, settings twice, steps
    server.close()
    for record in steps[20:]:
        trackers.step(record)
    trackers.close()
    assert len(caplog.messages) == 2 and "training goes on" in caplog.messages[0]
    assert caplog.messages[1] == "mlflow 2 records of the run did not reach it"
    assert set(server.authorizations) == {"Bearer a-token-of-mine"}
    assert redact("a-token-of-mine") == "***"


def test_a_job_file_does_not_send_credentials_elsewhere(
    tmp_path: Path, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = servers(200)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token-of-mine")
    credentials = tmp_path / "home" / ".mlflow" / "credentials"
    credentials.parent.mkdir()
    credentials.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = a-password\n")
    tell(tmp_path, section("mlflow", mlflow_uri=server.url), run_info(), 20)
    assert server.requests >= 5 and set(server.authorizations) == {None}
    known = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_TRACKING_TOKEN": "t", "HOME": "/home/me"}
    same = tracker_environment("mlflow", section("mlflow", mlflow_uri=server.url), tmp_path, known)
    assert (same["MLFLOW_TRACKING_TOKEN"], same["HOME"]) == ("t", "/home/me")


FULL = """
import logging, resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_trackers import section, tell
from telemetry_records import run_info
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
tell(Path(sys.argv[1]), section("tensorboard", every_steps=1), run_info(), 230)
print("trained to the end")
"""


def test_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent), "20000"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "trained to the end\n"), done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 2, done.stderr
    assert "cannot be told of the run, training goes on: " in said[0] and "File too large" in said[0]
    assert "did not reach it" in said[1]


def test_a_tracker_that_is_not_installed_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in (("tensorboard", "tracking"), ("mlflow", "mlflow"), ("wandb", "wandb")):
        with pytest.raises(
            UsageError, match=rf"trackers.names: {name} is not installed: pip install -e '.\[{extra}\]'"
        ):
            check_trackers(section(name))
    with pytest.raises(UsageError, match="not installed"):
        Station(MetricsSection(enabled=False), run_info(), trackers=section("wandb"))


STOPPED = """
[trackers]
names = ["mlflow", "tensorboard"]
mlflow_uri = "{url}"
every_steps = 1
patience_seconds = 60.0
"""


def test_a_run_is_stopped_while_a_tracker_hangs(tmp_path: Path, servers: Any) -> None:
    """A server that never answers: SIGTERM still ends the run with 75 and a checkpoint, and no process is left."""
    write_job(tmp_path, "wait", rank=0, steps=500)
    with open(tmp_path / "job.toml", "a") as file:
        file.write(STOPPED.format(url=servers().url))
    argv = [sys.executable, "-m", "ddp", "train", "job.toml", "--allow-import", "misbehaving"]
    folder = tmp_path / "runs" / "run"
    with started(argv, tmp_path) as process:
        wait_until(lambda: (folder / "trackers" / "mlflow").exists() and len(processes_in(folder / "trackers")) == 2)
        wait_until(lambda: (folder / "log.jsonl").read_text().count("\n") > 5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=45)  # less than the patience of a run that ends by itself
    assert process.returncode == 75, said
    assert "records of the run did not reach it" in said and "Traceback" not in said
    wait_until(lambda: not processes_in(folder))
    assert _read_steps(folder / "trackers" / "tensorboard")[:3] == [1, 2, 3]
    kinds = [line["kind"] for line in _logged(folder)]
    assert kinds[:2] == ["run", "step"] and kinds[-1] == "event"


def test_all_ranks_end_together_while_a_tracker_hangs(rank_pool: RankPool, tmp_path: Path, servers: Any) -> None:
    """Rank 0's patience ends before that of the others."""
    settings = {"names": ["mlflow"], "mlflow_uri": servers().url, "patience_seconds": 60.0}
    jobs = job(tmp_path, transport__timeout_seconds=4.0, **{f"trackers__{key}": settings[key] for key in settings})
    ended = train_ranks(rank_pool, 2, jobs, timeout=50.0)
    assert [(each.kind, each.threads) for each in ended] == [("", 0)] * 2, ended[1].message
    assert [line["step"] for line in _logged(tmp_path / "run") if line["kind"] == "step"] == list(range(1, 21))
    wait_until(lambda: not processes_in(tmp_path))


def _logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
