"""The `advise` command on records of runs: what it says of each kind of reading, and where little can be said."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ddp.diagnostics import command
from ddp.diagnostics.advice_text import seconds_text
from ddp.diagnostics.advise import Advice, MemoryQuestion, Question, advise, default_ranks
from ddp.errors import UsageError
from ddp.noise.noise_scale import Reading
from ddp.noise.readings import NoiseReadings
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.records import RunInfo
from telemetry_records import NAN, reading, run_info, step_records

ROOT = Path(__file__).resolve().parents[1]
JOB = """
[run]
epochs = 4
[task]
name = "digits"
[batch]
global_batch_size = 64
micro_batch_size = 32
[optimizer]
name = "adam"
learning_rate_rule = "sqrt"
"""

RESOLVED = reading("resolved", 71.0, 56.0, 92.0)
BOUND = reading("lower_bound", 900.0, 320.0, math.inf)
FITTED = reading("beyond_data", 5000.0, 1700.0, math.inf)
UNRESOLVED = reading("unresolved", NAN, NAN, NAN)


def recorded(folder: Path, readings: Sequence[Reading | None], info: RunInfo | None = None, job: str = JOB) -> Path:
    """A run directory whose step k observes the k-th reading; the last one holds on until step 60."""
    info = info or replace(run_info(), gradient_bytes=400_000)
    folder.mkdir(exist_ok=True)
    recorder = Recorder(folder / "run.db", info)
    observed = [None if each is None else replace(each) for each in readings]
    for index, record in enumerate(step_records(info, 60)):
        recorder.step(replace(record, noise=_noise(observed[min(index, len(observed) - 1)])))
    recorder.close()
    if job:
        (folder / "job.toml").write_text(job, encoding="utf-8")
    return folder


def _noise(of: Reading | None) -> NoiseReadings | None:
    return None if of is None else NoiseReadings(plain=of)


def said(folder: Path, **question: Any) -> str:
    return command.answer(folder, Question(**question), as_json=False)


def test_a_resolved_reading_in_full(tmp_path: Path) -> None:
    text = said(recorded(tmp_path, [RESOLVED]), ranks=(1, 2, 4), price_per_rank_hour=3.0)
    assert "digits-1: digits with adam, 2 ranks, 64 examples a step, 60 steps" in text
    assert "the noise scale is 71 (56-92). If the model holds here, doubling the batch would take 23-29 % fewer" in text
    assert "before the end" not in text
    assert "More ranks stop paying at " in text and "Paying means: twice the ranks make the run at least 1.5" in text
    assert "cost" in text and "rank-hours" not in text
    assert "learning rates follow the rule sqrt" in text and "x0.71" in text and "x1.41" in text
    assert "53 % (47 %..59 %)" in text  # 1/(1 + 64/71), at both ends
    assert "as measured" in text and "25 Gbit/s assumed" in text
    assert "Batches were not tried." in text


def test_the_numbers_are_those_of_the_model(tmp_path: Path) -> None:
    told = json.loads(command.answer(recorded(tmp_path, [RESOLVED]), Question(ranks=(2, 8)), as_json=True))
    two, eight = told["ranks"]
    assert two["same_batch"]["seconds"] == two["grown_batch"]["seconds"]
    assert two["same_batch"]["seconds"]["value"] == pytest.approx(60 * told["step"]["measured_seconds"], rel=1e-6)
    grown = eight["grown_batch"]
    assert grown["global_batch_size"] == 256
    for end, b in (("value", 71), ("low", 92), ("high", 56)):
        assert grown["steps"][end] == pytest.approx((1 + b / 256) / (1 + b / 64))
        assert grown["seconds"][end] == pytest.approx(60 * grown["steps"][end] * grown["step_seconds"])
    assert grown["learning_rate_factor"]["value"] == pytest.approx(2.0)
    assert grown["data_efficiency"]["low"] == pytest.approx(1 / (1 + 256 / 56))
    assert told["communication"]["inside_measured"] and not told["communication"]["between_measured"]


def test_an_older_resolved_reading_counts_and_its_age_is_told(tmp_path: Path) -> None:
    text = said(recorded(tmp_path, [RESOLVED] * 20 + [UNRESOLVED]))
    first, second = text.index("is not resolved"), text.index("the noise scale is 71 (56-92)")
    assert first < second
    assert "the latest resolved reading, 40 steps (1.7 epochs) before the end, and what follows rests on it." in text
    assert "To the loss that this run had after 60 steps" in text
    assert "More ranks stop paying" in text


@pytest.mark.parametrize("latest", [FITTED, BOUND], ids=["fitted", "bound"])
def test_a_reading_that_is_refuted_counts_for_the_way_to_it_only(tmp_path: Path, latest: Reading) -> None:
    folder = recorded(tmp_path, [RESOLVED] * 20 + [latest])
    text = said(folder)
    assert "since a later one says otherwise, it is about the way to that step only." in text
    assert "To the loss that this run had after 20 steps, if the model holds" in text
    whole = json.loads(command.answer(recorded(tmp_path / "whole", [RESOLVED]), Question(), as_json=True))
    part = json.loads(command.answer(folder, Question(), as_json=True))
    for one, other in zip(whole["ranks"], part["ranks"], strict=True):
        assert other["same_batch"]["seconds"]["value"] == pytest.approx(one["same_batch"]["seconds"]["value"] / 3)


def test_a_held_reading_is_told_by_the_step_that_observed_it(tmp_path: Path) -> None:
    info = replace(run_info(), world_size=1)
    seen = NoiseReadings(plain=replace(RESOLVED), method="micro_batches")
    with closing(Recorder(tmp_path / "run.db", info)) as recorder:
        for record in step_records(info, 60):
            recorder.step(replace(record, noise=seen if record.step <= 23 else replace(seen, method="none")))
    told = json.loads(command.answer(tmp_path, Question(), as_json=True))["reading"]
    assert (told["step"], told["steps_old"], told["method"]) == (1, 59, "micro_batches")
    assert "(56-92, from micro-batches)" in said(tmp_path)


def test_open_micro_batches_follow_a_batch_that_adapts_itself(tmp_path: Path) -> None:
    job = JOB.replace("global_batch_size = 64\nmicro_batch_size = 32", 'global_batch_size = "auto"')
    (tmp_path / "job.toml").write_text(job, encoding="utf-8")
    with closing(Recorder(tmp_path / "run.db", replace(run_info(), micro_batch_size=16))) as recorder:
        for record in step_records(run_info(), 60):
            larger = replace(record, examples=128, global_batch_size=128, examples_total=record.examples_total + 64)
            recorder.step(larger)
    told = json.loads(command.answer(tmp_path, Question(), as_json=True))
    assert (told["run"]["micro_batch_size"], told["step"]["micro_batch_size"]) == (32, 32)
    assert "after 60 steps (as many examples as 30 of 128), if the model holds:" in said(tmp_path)


@pytest.mark.parametrize("option", ["--price-per-rank-hour", "--memory-per-rank", "--link-latency-us"])
def test_an_infinite_number_ends_with_a_message(tmp_path: Path, option: str) -> None:
    arguments = [
        sys.executable,
        "-m",
        "ddp",
        "advise",
        str(recorded(tmp_path, [RESOLVED])),
        "--no-memory",
        option,
        "inf",
    ]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, "") and f"'{option}'" in ended.stderr


def test_a_lower_bound_says_at_least_and_nothing_finite_above(tmp_path: Path) -> None:
    folder = recorded(tmp_path, [UNRESOLVED] * 30 + [BOUND])
    text = said(folder, ranks=(2, 4))
    assert "the noise scale is at least 320" in text
    assert "x1.41" in text
    assert "83 %..100 %" in text  # 1/(1 + 64/320)
    told = json.loads(command.answer(folder, Question(ranks=(4,)), as_json=True))
    steps = told["ranks"][0]["grown_batch"]["steps"]
    assert (steps["low"], steps["high"]) == pytest.approx((0.5, (1 + 320 / 128) / (1 + 320 / 64)))


@pytest.mark.parametrize(
    ("readings", "words"),
    [
        ([None], "The noise scale was not measured in this run"),
        ([UNRESOLVED], "is not resolved"),
        ([FITTED], "The gradient is mostly noise: the training set is nearly fitted."),
        ([reading("wide", 71.0, 20.0, 900.0)], "too wide a range for advice"),
    ],
)
def test_without_a_reading_only_the_step_times_speak(tmp_path: Path, readings: list[Any], words: str) -> None:
    folder = recorded(tmp_path, readings)
    text = said(folder)
    assert words in text and "nly what the step times tell can be said." in text
    assert "with the global batch kept at 64" in text
    assert "data efficiency" not in text and "examples a rank," not in text
    told = json.loads(command.answer(folder, Question(), as_json=True))
    assert told["reading"] is None and told["more_ranks_stop_paying"]["grown_batch"] is None


def test_one_rank_has_no_all_reduce_to_measure(tmp_path: Path) -> None:
    text = said(recorded(tmp_path, [RESOLVED], replace(run_info(), world_size=1, gradient_bytes=400_000)))
    assert "1 rank, 64 examples a step" in text
    assert "as measured" not in text
    assert "8 ranks a node" in text


def test_ranks_of_several_nodes_measure_the_link(tmp_path: Path) -> None:
    info = replace(run_info(), world_size=4, nodes=2, gradient_bytes=400_000)
    text = said(recorded(tmp_path, [RESOLVED], info))
    assert "4 ranks on 2 nodes" in text and "2 ranks a node" in text
    assert "between nodes" in text and text.index("as measured") > text.index("between nodes")


def test_a_few_steps_say_nothing_of_time(tmp_path: Path) -> None:
    info = replace(run_info(), start_step=57)
    text = said(recorded(tmp_path, [RESOLVED], info))
    assert "Time and cost cannot be told: fewer than 5 steps" in text
    assert "the noise scale is 71" in text


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no record of a run here"):
        said(tmp_path)
    recorder = Recorder(tmp_path / "run.db", run_info())
    recorder.close()
    with pytest.raises(UsageError, match="has not recorded a step yet"):
        said(tmp_path)


@pytest.mark.parametrize(
    ("job", "task", "words"),
    [
        ("", "digits", "there is no .*job.toml"),
        (
            JOB.replace("digits", "mine:Task"),
            "mine:Task",
            "mine:Task runs code from outside ddp; give --allow-import mine to",
        ),
    ],
)
def test_why_batches_were_not_tried(tmp_path: Path, job: str, task: str, words: str) -> None:
    folder = recorded(tmp_path, [RESOLVED], replace(run_info(), task=task), job)
    found: Advice = advise(folder, Question(memory=MemoryQuestion()))
    assert found.largest is None
    assert re.search(words, found.not_tried)


def test_the_rule_of_the_job_file_or_of_the_record(tmp_path: Path) -> None:
    info = replace(run_info(), learning_rate_rule="linear")
    assert advise(recorded(tmp_path, [RESOLVED], info), Question()).optimizer.rule == "sqrt"
    (tmp_path / "job.toml").unlink()
    assert advise(tmp_path, Question()).optimizer.rule == "linear"


def test_ranks_are_read_from_a_list() -> None:
    assert command.parse_ranks("") == ()
    assert command.parse_ranks("8, 1,2,2") == (1, 2, 8)
    for bad in ("0", "1;2", "two", "-1", "9999999999"):
        with pytest.raises(UsageError, match="is not a number of ranks"):
            command.parse_ranks(bad)
    assert default_ranks(3)[:4] == (1, 2, 3, 4) and default_ranks(100)[-1] == 256


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.5, "0.5 s"), (64, "64 s"), (600, "10 min"), (9000, "2.5 h"), (864_000, "10 days")]
)
def test_times_are_readable(seconds: float, shown: str) -> None:
    assert seconds_text(seconds) == shown


@pytest.mark.parametrize("readings", [[RESOLVED], [BOUND], [None]])
def test_the_page_holds_the_sentences_and_fetches_nothing(tmp_path: Path, readings: list[Any]) -> None:
    folder = recorded(tmp_path, readings, replace(run_info(), run_id="a-b", gradient_bytes=400_000))
    text = said(folder)
    page = (folder / "advice.html").read_text(encoding="utf-8")
    ElementTree.fromstring(page.partition("\n")[2])
    (sentence,) = [line for line in text.splitlines() if line.startswith("More ranks stop paying")]
    assert sentence in page
    assert page.count("<svg") == (2 if readings == [None] else 4)
    assert "default-src 'none'" in page and "http" not in page.replace("http://www.w3.org", "").replace(
        "http-equiv", ""
    )
    assert [path.name for path in folder.iterdir() if path.name.startswith(".advice")] == []


def test_the_command_prints_json_alone_and_tries_batches(tmp_path: Path) -> None:
    recorded(tmp_path, [RESOLVED])
    arguments = ["advise", str(tmp_path), "--json", "--ranks", "1,2", "--memory-seconds", "120"]
    ended = subprocess.run(
        [sys.executable, "-m", "ddp", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["largest_batch_per_rank"]["examples"] == 1472
    assert told["step"]["split_by"] == "trials"
    assert told["batch_for_classes"] == [22, 33]  # the rarest of ten digits: 134 of 1,472
    assert "trying batches in a child process" in ended.stderr


def test_a_wrong_list_of_ranks_ends_with_a_message(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ddp", "advise", str(tmp_path), "--ranks", "some"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "'some' is not a number of ranks" in ended.stderr and "Traceback" not in ended.stderr
