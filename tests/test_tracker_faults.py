"""Trackers that die, hang, refuse or have no room, on real sockets: the run goes on, and says so once."""

from __future__ import annotations

import os
import signal
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddp.job import redact
from ddp.telemetry.trackers import tracker as tracker_module
from ddp.telemetry.trackers.environment import tracker_environment
from ddp.telemetry.trackers.group import Trackers
from jobs import started, wait_until, write_job
from ranks import RankPool
from telemetry_records import run_info, step_records
from tracker_server import Server
from tracking import SETTINGS, logged, processes_in, read_steps, section, tell
from training_runs import job, train_ranks

pytestmark = pytest.mark.usefixtures("no_credentials")

MUTE_PATIENCE = 1.0  # seconds, for what never answers


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
    assert read_steps(folder) == [1, 10, 20, 30, 40, 50, 60]
    assert caplog.messages == [
        "tensorboard cannot be told of the run, training goes on: its process ended with code -9"
    ]


def _has_steps(folder: Path, count: int) -> bool:
    try:
        return len(read_steps(folder)) >= count
    except KeyError:
        return False


def test_servers_that_never_answer_hold_nothing_up(
    tmp_path: Path,
    tracker_servers: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both take the connection and hang; what has no room is dropped and counted; their processes are gone at the end."""
    monkeypatch.setattr(tracker_module, "QUEUE_LENGTH", 50)
    mute = tracker_servers()
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
    tmp_path: Path,
    tracker_servers: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tracker_servers(500)
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
    tmp_path: Path,
    tracker_servers: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was told is told; then one line; and credentials go where the environment says."""
    server = tracker_servers(200)
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
    tmp_path: Path, tracker_servers: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tracker_servers(200)
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


def test_a_home_without_credentials_has_the_users_packages_all_the_same(tmp_path: Path) -> None:
    """`pip install --user` puts MLflow under HOME, which is another one in its process."""
    environment = tracker_environment("mlflow", section("mlflow"), tmp_path, os.environ)
    asked = [sys.executable, "-c", "import site; print(site.getuserbase())"]
    found = subprocess.run(asked, check=True, capture_output=True, text=True, env=environment).stdout.strip()
    assert environment["HOME"] == str(tmp_path) and found == site.getuserbase()


FULL = """
import logging, resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tracking import section, tell
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


STOPPED = """
[trackers]
names = ["mlflow", "tensorboard"]
mlflow_uri = "{url}"
every_steps = 1
patience_seconds = 60.0
"""


def test_a_run_is_stopped_while_a_tracker_hangs(tmp_path: Path, tracker_servers: Callable[..., Server]) -> None:
    """A server that never answers: SIGTERM still ends the run with 75 and a checkpoint, and no process is left."""
    write_job(tmp_path, "wait", rank=0, steps=500)
    with open(tmp_path / "job.toml", "a") as file:
        file.write(STOPPED.format(url=tracker_servers().url))
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
    assert read_steps(folder / "trackers" / "tensorboard")[:3] == [1, 2, 3]
    kinds = [line["kind"] for line in logged(folder)]
    assert kinds[:2] == ["run", "step"] and kinds[-1] == "event"


def test_all_ranks_end_together_while_a_tracker_hangs(
    rank_pool: RankPool, tmp_path: Path, tracker_servers: Callable[..., Server]
) -> None:
    """Rank 0's patience ends before that of the others."""
    settings = {"names": ["mlflow"], "mlflow_uri": tracker_servers().url, "patience_seconds": 60.0}
    jobs = job(tmp_path, transport__timeout_seconds=4.0, **{f"trackers__{key}": settings[key] for key in settings})
    ended = train_ranks(rank_pool, 2, jobs, timeout=50.0)
    assert [(each.kind, each.threads) for each in ended] == [("", 0)] * 2, ended[1].message
    assert [line["step"] for line in logged(tmp_path / "run") if line["kind"] == "step"] == list(range(1, 21))
    wait_until(lambda: not processes_in(tmp_path))
