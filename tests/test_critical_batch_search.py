"""`ddp critical-batch` in real processes: to its end, stopped and resumed, with trials that are killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp.search.progress import SearchProgress
from ddp.search.store import TrialResult, read_fact, read_trials, write_fact, write_trial
from ddp.search.sweep_file import load_sweep
from ddp.telemetry.critical_batches import read_critical_batches
from jobs import Ended, finish, is_running, python, run_command, started, wait_until
from launch.submit import descendants
from search_trials import simulated_trials

SWEEP = """
[sweep]
directory = "out"
batch_sizes = [2, 8, 16, 32, 128]
learning_rates = {rates}
targets = [2.0, 1.0]
subset_examples = 8
workers = 2

[task]
name = "{task}"
{options}

[batch]
global_batch_size = 8

[optimizer]
name = "sgd"
learning_rate = 0.05

[evaluation]
metric = "distance"
"""

# A bowl of which somebody may want to know when it is being run down, or that kills its process.
TASK = """
import os, signal, time
from pathlib import Path
from ddp.job import QuadraticSection
from ddp.tasks.synthetic import QuadraticTask

class Task(QuadraticTask):
    def __init__(self, kill_above=10**9, seconds=0.0):
        super().__init__(QuadraticSection(name="quadratic", dimension=256, distance=4.0))
        self.kill_above, self.seconds = kill_above, seconds

    def loss(self, model, batch):
        if model.training and len(batch[0]) > self.kill_above:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return super().loss(model, batch)
"""
QUADRATIC = "dimension = 256\ndistance = 4.0"


def write_sweep(
    folder: Path, task: str = "quadratic", options: str = QUADRATIC, rates: str = "[0.02, 0.05, 0.1]"
) -> None:
    (folder / "sweep.toml").write_text(SWEEP.format(task=task, options=options, rates=rates))
    (folder / "sleepy.py").write_text(TASK)


def command(*arguments: str) -> list[str]:
    return python("-m", "ddp", "critical-batch", "sweep.toml", *arguments)


def run(folder: Path, *arguments: str) -> Ended:
    return run_command(command(*arguments), folder, timeout=120)


def trials(folder: Path) -> list[TrialResult]:
    return read_trials(folder / "out" / "sweep.db")


def keys(found: list[TrialResult]) -> list[tuple[int, float, int]]:
    return [(trial.batch_size, trial.learning_rate, trial.seed) for trial in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("finished")
    write_sweep(folder)
    return folder, run(folder)


def test_a_search_runs_every_trial_once_and_writes_its_results(finished: tuple[Path, Ended]) -> None:
    folder, ended = finished
    assert ended.code == 0, ended.stderr
    directory, *words = ended.stdout.splitlines()
    assert directory == "out"
    assert [each.partition(", because")[0] for each in words] == [
        "SGD to training loss 2: no critical batch size",
        "SGD to training loss 1: no critical batch size",
    ]
    assert all("the best learning rate lies on the edge of those tried at batch sizes" in each for each in words)
    found = trials(folder)
    assert len(found) == len(set(keys(found))) == 5 * 3 * 3
    assert {trial.stopped_because for trial in found} <= {"targets", "hopeless", "diverged", "budget"}
    assert "45/45" in ended.stderr and "batch 128" in ended.stderr
    results = json.loads((folder / "out" / "result.json").read_text())
    assert [(each["method"], each["optimizer"], each["target_loss"]) for each in results] == [
        ("sweep", "sgd", 2),
        ("sweep", "sgd", 1),
    ]
    read_critical_batches(str(folder / "out" / "result.json"))  # a run can show it
    assert (folder / "out" / "report.html").stat().st_size > 1000
    assert (folder / "out").stat().st_mode & 0o777 == 0o700


def test_the_steps_of_all_trials_are_those_of_theory(finished: tuple[Path, Ended]) -> None:
    """E L falls by (1 - e)^2 a step towards e^2 sigma^2 D / (2 b (2 e - e^2)); 256 axes, so within a few percent."""
    folder, _ = finished
    compared = 0
    for trial in trials(folder):
        e, loss, expected = trial.learning_rate, 8.0, [8.0]
        for _ in range(2000):
            loss = (1 - e) ** 2 * loss + e * e * 256 / (2 * trial.batch_size)
            expected.append(loss)
        for target, steps in zip(trial.targets, trial.steps_to_target, strict=True):
            if expected[-1] < 0.3 * target and steps == steps:
                exact = float(np.interp(-target, -np.array(expected), np.arange(len(expected))))
                assert steps == pytest.approx(exact, rel=0.1, abs=1.5)
                compared += 1
    assert compared > 25


def test_a_finished_search_is_neither_mixed_nor_repeated(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    before = trials(folder)
    refused = run(folder)
    assert refused.code == 2 and "give --resume" in refused.stderr
    other = run(folder, "--resume", "--set", "sweep.seeds=4", "--set", "optimizer.momentum=0.5")
    assert other.code == 2 and "another optimizer.momentum, sweep.seeds" in other.stderr
    again = run(folder, "--resume", "--workers", "1")
    assert again.code == 0, again.stderr
    assert list(map(repr, trials(folder))) == list(map(repr, before))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_search_leaves_nobody_behind_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    write_sweep(tmp_path, "sleepy:Task", "options = { seconds = 0.001 }", "[0.05, 0.1]")
    with started(command("--allow-import", "sleepy"), tmp_path) as process:
        wait_until(lambda: len(safely(tmp_path)) >= 3)
        if number == signal.SIGTERM:
            refused = run(tmp_path, "--allow-import", "sleepy", "--resume")
            assert refused.code == 2 and "running here already" in refused.stderr
        below = descendants(process.pid)
        assert len(below) >= 2
        if number == signal.SIGINT:  # a terminal's reaches the whole group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        ended = finish(process, 30)
    assert ended.code == 75, ended.stderr
    assert "--resume" in ended.stderr and "Traceback" not in ended.stderr
    wait_until(lambda: not any(map(is_running, below)), 10)
    before = trials(tmp_path)
    assert 3 <= len(before) < 30
    if number == signal.SIGINT:
        return
    after = run(tmp_path, "--allow-import", "sleepy", "--resume", "--set", "sweep.workers=3")
    assert after.code == 0, after.stderr
    found = trials(tmp_path)
    assert list(map(repr, found[: len(before)])) == list(map(repr, before))
    assert len(found) == len(set(keys(found))) == 30


def safely(folder: Path) -> list[TrialResult]:
    path = folder / "out" / "sweep.db"
    return trials(folder) if path.exists() and path.stat().st_size else []


def test_a_trial_that_is_killed_is_named_and_the_search_goes_on(tmp_path: Path) -> None:
    write_sweep(tmp_path, "sleepy:Task", "options = { kill_above = 24 }", "[0.05, 0.1]")
    ended = run(tmp_path, "--allow-import", "sleepy", "--set", "sweep.batch_sizes=[2, 4, 8, 16, 128]")
    assert ended.code == 0, ended.stderr
    assert "batch 128  learning rate 0.05  seed 0  failed: was killed by SIGKILL (out of memory?)" in ended.stderr
    found = trials(tmp_path)
    failed = [trial for trial in found if trial.stopped_because == "failed"]
    # Where the noise scale is sampled, 64 examples come in four parts of 16, and a batch of 128 in four of 32.
    assert {trial.batch_size for trial in failed} == {128} and len(failed) == 6
    assert len(found) == 30
    with sqlite3.connect(tmp_path / "out" / "sweep.db") as database:
        rows: list[Any] = database.execute("SELECT DISTINCT cause FROM trials WHERE batch_size = 128").fetchall()
    database.close()
    assert rows == [("was killed by SIGKILL (out of memory?)",)]


def test_when_all_trials_fail_the_search_says_why(tmp_path: Path) -> None:
    write_sweep(tmp_path, "sleepy:Task", "options = { kill_above = 0 }", "[0.05, 0.1]")
    ended = run(tmp_path, "--allow-import", "sleepy")
    assert ended.code == 1 and "every trial so far failed, the last one: was killed by SIGKILL" in ended.stderr


def test_what_cannot_be_run_is_said_once_and_leaves_no_process(tmp_path: Path) -> None:
    write_sweep(tmp_path, "sleepy:Task", "", "[0.05, 0.1]")
    ended = run(tmp_path)
    assert ended.code == 2 and ended.stderr.count("--allow-import") == 1 and "Traceback" not in ended.stderr
    write_sweep(tmp_path, options="dimension = 256")
    ended = run(tmp_path, "--set", "evaluation.metric=accuracy", "--set", "sweep.directory=new/out")
    assert ended.code == 2 and "metric" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "sleepy.py",
        "sweep.toml",
    ]  # a corrected file may follow


@pytest.mark.parametrize("directory", ["/proc/nowrite/x", "sweep.toml", "sweep.toml/below"])
def test_a_directory_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, directory: str) -> None:
    write_sweep(tmp_path)
    ended = run(tmp_path, "--set", f"sweep.directory={directory}")
    assert ended.code == 2
    (line,) = ended.stderr.splitlines()
    assert f"{directory}: results cannot be written there: " in line
    assert line.endswith("; give another sweep.directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sleepy.py", "sweep.toml"]


def test_targets_and_learning_rates_are_found_by_themselves(tmp_path: Path) -> None:
    """On a bowl with curvatures from 1 to 1/20: the targets by pilot runs, and the best rate inside everywhere."""
    write_sweep(tmp_path, options="dimension = 64\nnoise = 0.3\ncondition_number = 20.0", rates='"auto"')
    ended = run(
        tmp_path,
        "--set",
        'sweep.targets="auto"',
        "--set",
        "optimizer.learning_rate=0.4",
        "--set",
        "sweep.batch_sizes=[4, 16, 32, 64, 256]",
    )
    assert ended.code == 0, ended.stderr
    targets = read_fact(tmp_path / "out" / "sweep.db", "targets")
    assert len(targets) == 3 and targets == sorted(targets, reverse=True)
    for result in json.loads((tmp_path / "out" / "result.json").read_text()):
        assert all(best["interior"] for best in result["fit"]["best"])
        assert [best["batch_size"] for best in result["fit"]["best"]] == [4, 16, 32, 64, 256]
        assert all(best["seeds"] == 3 for best in result["fit"]["best"])


def test_what_a_search_shows_ends_at_what_was_run() -> None:
    """On a terminal a bar that is full, elsewhere a line that says how many there were."""
    stream = Terminal()
    with SearchProgress(stream) as progress:
        progress.begin("a look", 1, 2)
        progress.trial(next(simulated_trials()))
        progress.end()
        progress.begin("branches", 68, 2)
        for trial in islice(simulated_trials(), 60):
            progress.trial(trial)
        progress.end()
        assert progress._bar is not None
        (bar,) = progress._bar.tasks
        assert (bar.completed, bar.total) == (60, 60)
    shown = io.StringIO()
    with SearchProgress(shown) as progress:
        for expected, run in ((1, 1), (68, 3), (2, 3), (5, 0)):
            progress.begin("stage", expected, 2)
            for trial in islice(simulated_trials(), run):
                progress.trial(trial)
            progress.end()
    assert [line for line in shown.getvalue().splitlines() if line.startswith("stage")] == [
        "stage: about 1 trial, 2 side by side",
        "stage: about 68 trials, 2 side by side",
        "stage: complete after 3 trials",
        "stage: about 2 trials, 2 side by side",
        "stage: about 5 trials, 2 side by side",
        "stage: complete after 0 trials",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_matplotlib_a_finished_search_is_told_and_the_page_left_out(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    """In a process that cannot find it, as where the extra `report` is not installed."""
    folder, ended = finished
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/out/report.html").unlink()
    (tmp_path / "copy/out/result.json").unlink()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(WITHOUT_MATPLOTLIB)
    path = os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])
    without = run_command(command("--resume"), tmp_path / "copy", timeout=60, extra={"PYTHONPATH": path})
    assert without.code == 0, without.stderr
    assert without.stdout == ended.stdout
    assert "no out/report.html: it needs matplotlib, pip install -e '.[report]'" in without.stderr
    assert (tmp_path / "copy/out/result.json").read_text() == (folder / "out/result.json").read_text()
    assert not (tmp_path / "copy/out/report.html").exists()


WITHOUT_MATPLOTLIB = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name == "matplotlib" else find(name, path, target)
"""


def test_a_sweep_may_follow_branches_in_their_directory(tmp_path: Path) -> None:
    """They are no sweep that was begun; one that was begun is still not run over."""
    write_sweep(tmp_path, rates="[0.05]")
    (tmp_path / "out").mkdir()
    branch = replace(next(simulated_trials(method="branched")), origin="/run/checkpoints/step-00000020", multiple=1.0)
    write_trial(tmp_path / "out/sweep.db", branch)
    write_fact(tmp_path / "out/sweep.db", "definition", load_sweep(tmp_path / "sweep.toml").definition())
    ended = run(tmp_path)
    assert ended.code == 0, ended.stderr
    assert [trial.method for trial in trials(tmp_path)] == ["branched", *["sweep"] * 15]
    refused = run(tmp_path)
    assert refused.code == 2 and "there is a search already; give --resume to go on" in refused.stderr
