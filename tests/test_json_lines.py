"""log.jsonl: every line is JSON as others read it, and the steps in it are those of the record."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddp.job import hide
from ddp.telemetry.records import ParametersRecord, RunEvent, RunInfo
from ddp.telemetry.trackers import json_lines
from ddp.telemetry.trackers.json_lines import JsonLines
from jobs import wait_until
from telemetry_records import (
    START_UNIX_TIME,
    batch_changes,
    evaluation_records,
    feed,
    run_info,
    step_records,
    with_reading,
)


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in lines_of(path) if line["kind"] == "step"]


def log_all(path: Path, info: RunInfo, last_step: int) -> None:
    sink = JsonLines(path, info)
    feed(sink, info, last_step)
    sink.close()
    sink.close()


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path, info = tmp_path / "log.jsonl", run_info()
    sink = JsonLines(path, info)
    first = replace(step_records(info, 1)[0], loss=math.nan, gradient_norm=math.inf, metric=0.5, momentum=0.9)
    sink.step(first)
    sink.step(with_reading(step_records(info, 2)[1], None))
    sink.evaluation(replace(evaluation_records(info)[1], metrics={"accuracy": math.nan, "größe": -math.inf}))
    sink.batch_change(batch_changes(info)[0])
    sink.event(RunEvent(2, START_UNIX_TIME, "saved", -1, "a line\nand another \udcff", 0.5))
    sink.parameters(ParametersRecord(1, ()))
    sink.close()
    run, step, plain, evaluation, change, event = lines_of(path)
    assert (run["kind"], run["run_id"], run["world_size"], run["target"]) == ("run", "digits-1", 2, 0.97)
    assert (step["kind"], step["step"], step["loss"], step["gradient_norm"]) == ("step", 1, None, "Infinity")
    assert (step["metric"], step["momentum"], step["unix_time"]) == (0.5, 0.9, first.unix_time)
    assert (step["noise_scale"], step["noise_scale_state"]) == (None, "unresolved")
    assert "noise_scale" not in plain
    assert evaluation["split"] == "validation" and evaluation["metrics"] == {"accuracy": None, "größe": "-Infinity"}
    assert (change["kind"], change["before"], change["after"]) == ("batch_change", 64, 128)
    assert (event["kind"], event["event"], event["text"]) == ("event", "saved", "a line\nand another \udcff")
    assert event["stall_seconds"] is None
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_resume_replaces_the_steps_it_takes_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log_all(path, run_info(), 71)
    with open(path, "a") as file:
        file.write('{"kind":"event","step":71}\n["not ours"]\n{"kind":"step","step":72,"cut by a ki')
    log_all(path, run_info(start_step=46, restarts=1), 50)
    found = lines_of(path)
    assert [line["step"] for line in found if not isinstance(line, list) and line["kind"] == "step"] == list(
        range(1, 51)
    )
    assert [line["start_step"] for line in found if "start_step" in line] == [0, 46]
    assert [line["step"] for line in found if "split" in line] == [23, 23, 46, 46]
    assert ["not ours"] in found and {"kind": "event", "step": 71} in found
    assert [each.name for each in tmp_path.iterdir()] == ["log.jsonl"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_roll_back_forgets_steps_and_keeps_what_happened(tmp_path: Path) -> None:
    path, info = tmp_path / "log.jsonl", run_info()
    sink = JsonLines(path, info, interval_seconds=0.01)
    feed(sink, info, 30)
    for _ in range(2):
        sink.event(RunEvent(20, START_UNIX_TIME, "rolled_back", -1, "back to step 20"))
        for record in step_records(replace(info, start_step=20), 25):
            sink.step(record)
    sink.close()
    assert steps_of(path) == list(range(1, 26))
    assert [line["event"] for line in lines_of(path) if line["kind"] == "event"] == ["rolled_back"] * 2
    assert [line["step"] for line in lines_of(path) if line["kind"] == "evaluation"] == []


def test_a_file_that_is_taken_away_begins_anew(tmp_path: Path) -> None:
    path, info = tmp_path / "log.jsonl", run_info()
    sink = JsonLines(path, info, interval_seconds=0.01)
    steps = step_records(info, 20)
    for record in steps[:10]:
        sink.step(record)
    wait_until(lambda: path.exists() and len(steps_of(path)) == 10)
    path.unlink()
    for record in steps[10:]:
        sink.step(record)
    sink.close()
    assert steps_of(path) == list(range(11, 21))


def test_secrets_are_not_in_it(tmp_path: Path) -> None:
    hide("the-trackers-token")
    sink = JsonLines(tmp_path / "log.jsonl", run_info())
    sink.event(RunEvent(1, START_UNIX_TIME, "save_failed", -1, "Authorization: the-trackers-token"))
    sink.close()
    assert lines_of(tmp_path / "log.jsonl")[-1]["text"] == "Authorization: ***"


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "other")
    log_all(tmp_path / "log.jsonl", run_info(), 5)
    assert (tmp_path / "other").read_text() == "mine"
    assert len(caplog.messages) == 2 and "training goes on" in caplog.messages[0]
    assert "6 lines were not written" in caplog.messages[1]


def test_a_record_that_is_none_costs_its_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink, steps = JsonLines(tmp_path / "log.jsonl", run_info()), step_records(run_info(), 3)
    for record in (steps[0], replace(steps[1], examples=object()), steps[2]):  # type: ignore[arg-type]
        sink.step(record)
    sink.close()
    assert steps_of(tmp_path / "log.jsonl") == [1, 3]
    assert "a record is none" in caplog.messages[0] and "1 lines were not written" in caplog.messages[1]


def test_a_queue_without_room_drops_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(json_lines, "QUEUE_LENGTH", 10)
    with caplog.at_level(logging.WARNING):
        log_all(tmp_path / "log.jsonl", run_info(), 20)
    assert steps_of(tmp_path / "log.jsonl") == list(range(1, 10))
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "is incomplete, training goes on: it does not keep up with the run",
        "11 lines were not written",
    ]


FULL = """
import logging, resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from telemetry_records import run_info, step_records
from ddp.telemetry.trackers.json_lines import JsonLines
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sink = JsonLines(Path(sys.argv[1]), run_info(), interval_seconds=0.001)
for record in step_records(run_info(epochs=60)):
    sink.step(record)
sink.close()
print("trained to the end")
"""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "log.jsonl"), str(Path(__file__).parent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "trained to the end\n"), done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 2 and "File too large" in said[0] and "were not written" in said[1]
    assert steps_of(tmp_path / "log.jsonl") == list(range(1, len(steps_of(tmp_path / "log.jsonl")) + 1))
