"""`ddp sweep` in real processes: planted optima, trials that go wrong, masters that are stopped, killed and joined."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ddp.sweep.launching import Request
from jobs import Ended, finish, is_running, python, run_command, started, wait_until
from launch.submit import descendants

SWEEP = """
[sweep]
directory = "out"
workers = 2
trials = {trials}
sampler = "{sampler}"
{settings}

[sweep.dimensions]
{dimensions}

[run]
steps = {steps}
device = "cpu"

[task]
{task}

[batch]
global_batch_size = 8
micro_batch_size = 4

[optimizer]
name = "sgd"
learning_rate = 0.05

[noise_scale]
enabled = false

[evaluation]
metric = "distance"
every_steps = {every}
"""

# A bowl that goes wrong on request, in the third step.
TASK = """
import os, signal, time
from ddp.errors import UsageError
from ddp.job import QuadraticSection
from ddp.tasks.synthetic import QuadraticTask

class Task(QuadraticTask):
    def __init__(self, action="none", seconds=0.0):
        super().__init__(QuadraticSection(name="quadratic", dimension=8, distance=4.0))
        self.action, self.seconds, self.count = action, seconds, 0

    def loss(self, model, batch):
        losses = super().loss(model, batch)
        if not model.training:
            return losses
        self.count += 1
        time.sleep(self.seconds)
        if self.count > 3 and self.action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count > 3 and self.action == "raise":
            raise ValueError("this is the cause")
        if self.count > 3 and self.action == "nan":
            return losses * float("nan")
        while self.count > 3 and self.action == "hang":
            time.sleep(60)
        return losses
"""


def write_sweep(
    folder: Path,
    dimensions: str,
    *,
    trials: int = 8,
    sampler: str = "random",
    settings: str = "",
    steps: int = 30,
    every: int = 10,
    task: str = 'name = "sleepy:Task"',
) -> None:
    keys = {"dimensions": dimensions, "trials": trials, "sampler": sampler, "settings": settings}
    (folder / "sweep.toml").write_text(SWEEP.format(**keys, steps=steps, every=every, task=task))
    (folder / "sleepy.py").write_text(TASK)


def command(*arguments: str) -> list[str]:
    return python("-m", "ddp", "sweep", "sweep.toml", "--allow-import", "sleepy", *arguments)


def run(folder: Path, *arguments: str) -> Ended:
    return run_command(command(*arguments), folder, timeout=150)


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "out" / "results.json").read_text())["trials"]


def told(folder: Path) -> set[str]:
    """Trials that have ended, by the journal's own lines."""
    with contextlib.suppress(FileNotFoundError):
        return set(re.findall(r'"trial_id":(\d+),"state":[1-3]', (folder / "out" / "journal.log").read_text()))
    return set()


def parts(folder: Path, number: str) -> int:
    """Processes that wrote the record of a trial."""
    record = folder / "out" / "trials" / f"trial-{int(number):04d}" / "run.db"
    with contextlib.closing(sqlite3.connect(record)) as database:
        return database.execute("SELECT count(*) FROM run").fetchone()[0]


# --- what is found --------------------------------------------------------------------------------------------------

DIMENSION, NOISE, STEPS, DISTANCE = 64, 1.0, 40, 8.0


def mean_loss(rate: float) -> float:
    """E L after STEPS steps of SGD at batches of 8, exactly: see ddp.tasks.synthetic."""
    left = (1 - rate) ** 2
    loss = 0.5 * DISTANCE**2
    for _ in range(STEPS):
        loss = left * loss + 0.5 * rate**2 * NOISE**2 * DIMENSION / 8
    return loss


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Random trials over four decades of learning rate, then a narrower stage by TPE."""
    folder = tmp_path_factory.mktemp("searched")
    stages = """
[[sweep.stages]]
name = "coarse"
trials = 12
[[sweep.stages]]
name = "fine"
trials = 10
sampler = "tpe"
narrow = 0.4"""
    write_sweep(
        folder,
        '"optimizer.learning_rate" = { low = 1e-3, high = 1.9 }',
        settings="seed = 1\nkeep = 3" + stages,
        steps=STEPS,
        every=STEPS,
        task=f'name = "quadratic"\ndimension = {DIMENSION}\nnoise = {NOISE}\ndistance = {DISTANCE}',
    )
    return folder, run(folder)


def test_a_planted_optimum_is_found(searched: tuple[Path, Ended]) -> None:
    """The learning rate that theory has as the best; within a factor of 2 by random search, of 1.5 after TPE."""
    folder, ended = searched
    assert ended.code == 0, ended.stderr
    rates = [1.02**power for power in range(-350, 30)]
    best = min(rates, key=mean_loss)
    found = {
        stage: min((each for each in results(folder) if each["stage"] == stage), key=lambda each: each["value"])
        for stage in ("coarse", "fine")
    }
    assert 0.05 < best < 0.2
    for stage, factor in (("coarse", 2.0), ("fine", 1.5)):
        assert best / factor < found[stage]["values"]["optimizer.learning_rate"] < best * factor
    assert ended.stdout.splitlines()[0] == "out"
    assert "one validation fold" in ended.stdout
    for each in results(folder):
        assert each["state"] == "complete" and each["steps"] == STEPS
        assert each["training_value"] == each["value"]  # of the position, whatever the examples
        assert 50 << 20 < each["peak_memory_bytes"] < 4 << 30 and 0 < each["seconds"] < 60


def test_the_stage_is_narrower_by_the_runs_own_jobs(searched: tuple[Path, Ended]) -> None:
    folder, _ = searched
    rates = {
        stage: [each["values"]["optimizer.learning_rate"] for each in results(folder) if each["stage"] == stage]
        for stage in ("coarse", "fine")
    }
    assert (len(rates["coarse"]), len(rates["fine"])) == (12, 10)
    assert max(rates["coarse"]) / min(rates["coarse"]) > 200
    assert max(rates["fine"]) / min(rates["fine"]) <= (1.9 / 1e-3) ** 0.4
    jobs = sorted((folder / "out" / "fine").glob("trial-*/job.toml"))
    assert [float(re.search(r"^learning_rate = (\S+)$", job.read_text(), re.M)[1]) for job in jobs] == rates["fine"]  # type: ignore[index]


def test_a_sweep_is_not_begun_again_and_another_is_refused(searched: tuple[Path, Ended]) -> None:
    folder, _ = searched
    before = results(folder)
    refused = run(folder)
    assert refused.code == 2 and "give --resume" in refused.stderr
    other = run(folder, "--resume", "--set", "sweep.seed=2", "--set", "optimizer.momentum=0.5")
    assert other.code == 2 and "another optimizer.momentum, sweep.seed" in other.stderr
    assert results(folder) == before
    assert list((folder / "out" / "masters").iterdir()) == []


def test_the_best_job_runs_and_only_the_best_keep_their_checkpoints(searched: tuple[Path, Ended]) -> None:
    folder, _ = searched
    assert len(list((folder / "out" / "fine").glob("trial-*/checkpoints"))) == 3
    trained = run_command(
        python("-m", "ddp", "train", "out/best.toml", "--set", "metrics.enabled=false", "--set", "run.id=best"), folder
    )
    assert trained.code == 0, trained.stderr
    best = min(results(folder), key=lambda each: each["value"])
    shown = re.search(r"distance (\S+), loss", trained.stdout)
    assert shown is not None and float(shown[1]) == pytest.approx(best["value"], rel=1e-3)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_trials_that_die_hang_raise_or_diverge_are_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    write_sweep(
        tmp_path,
        '"task.options.action" = ["none", "die", "raise", "nan", "hang", "none "]',
        sampler="grid",
        settings="silence_seconds = 3.0\nstop_seconds = 1.0",
    )
    ended = run(tmp_path)
    assert ended.code == 0, ended.stderr
    found = {each["values"]["task.options.action"]: each for each in results(tmp_path)}
    assert {action: each["state"] for action, each in found.items()} == {
        "none": "complete",
        "none ": "complete",
        "die": "failed",
        "raise": "failed",
        "nan": "diverged",
        "hang": "failed",
    }
    assert "was killed by SIGKILL" in found["die"]["cause"]
    assert "this is the cause" in found["raise"]["cause"]
    assert "not finite" in found["nan"]["cause"]
    assert "hung: nothing new in its record for 3 s" in found["hang"]["cause"]
    assert "this is the cause" in (tmp_path / "out" / "trials" / "trial-0002.log").read_text()
    assert "3 of 6 trials failed" in ended.stdout


def test_bad_trials_are_ended_early_on_two_ranks(tmp_path: Path) -> None:
    """One that trains well, then one whose rate is far too small and whose steps are slow: real torchruns. Both ranks of the
    second leave after the same step."""
    write_sweep(
        tmp_path,
        '"optimizer.learning_rate" = [0.1, 1e-6]\n"task.options.seconds" = { values = [0.02], when = { '
        '"optimizer.learning_rate" = 1e-6 } }',
        sampler="grid",
        settings="ranks = 2\n[sweep.pruner]\nstartup_trials = 1",
        steps=400,
        every=20,
    )
    ended = run(tmp_path, "--workers", "1")
    assert ended.code == 0, ended.stderr
    good, bad = results(tmp_path)
    assert (good["state"], bad["state"]) == ("complete", "pruned")
    assert "others were better by then" in bad["cause"]
    assert 20 <= bad["steps"] < 400
    log = (tmp_path / "out" / "trials" / "trial-0001.log").read_text()
    assert "SIGKILL" not in log
    record = tmp_path / "out" / "trials" / "trial-0001" / "run.db"
    with contextlib.closing(sqlite3.connect(record)) as database:
        assert database.execute("SELECT world_size FROM run").fetchall() == [(2,)]
        text = database.execute("SELECT text FROM events WHERE kind = 'saved' ORDER BY id DESC").fetchone()[0]
    assert str(bad["steps"]) in text  # the state that both saved is that of the last step
    assert good["peak_memory_bytes"] > 50 << 20


# --- masters --------------------------------------------------------------------------------------------------------

SLOW = 'name = "sleepy:Task"\noptions = { seconds = 0.02 }'
RATE = '"optimizer.learning_rate" = { low = 1e-3, high = 1.0 }'


def test_masters_that_are_killed_stopped_and_joined_run_each_trial_once(tmp_path: Path) -> None:
    """One is killed, the next is stopped, and two that work side by side finish what is left."""
    write_sweep(tmp_path, RATE, trials=12, task=SLOW, steps=30, settings='pruner.name = "none"')
    with started(command(), tmp_path) as master:
        wait_until(lambda: len(told(tmp_path)) >= 2)
        below = descendants(master.pid)
        os.kill(master.pid, signal.SIGKILL)
        finish(master)
    wait_until(lambda: not any(map(is_running, below)))
    seen = [told(tmp_path)]
    with started(command("--resume"), tmp_path) as master:
        wait_until(lambda: len(told(tmp_path)) >= len(seen[0]) + 2)
        below = descendants(master.pid)
        master.send_signal(signal.SIGTERM)
        stopped = finish(master)
    assert stopped.code == 75 and "go on with --resume" in stopped.stderr, stopped.stderr
    wait_until(lambda: not any(map(is_running, below)))
    seen.append(told(tmp_path))
    before = {each["trial"]: each["value"] for each in results(tmp_path) if each["state"] == "complete"}
    assert 4 <= len(seen[1]) == len(before) < 12
    begun = {number: parts(tmp_path, number) for number in seen[1]}
    with started(command("--join", "--workers", "1"), tmp_path) as one, started(command("--join"), tmp_path) as other:
        wait_until(lambda: len([each for each in masters(tmp_path) if each]) == 2)
        beside = run(tmp_path, "--resume")
        ended = [finish(one), finish(other)]
    assert [each.code for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert beside.code == 2 and "give --join to work beside it" in beside.stderr
    found = results(tmp_path)
    assert [each["trial"] for each in found] == [f"trial-{number:04d}" for number in range(12)]
    assert {each["state"] for each in found} == {"complete"}
    assert before.items() <= {each["trial"]: each["value"] for each in found}.items()
    assert {number: parts(tmp_path, number) for number in seen[1]} == begun  # not touched again
    run_by = [re.findall(r"trials/trial-(\d+)", each.stderr) for each in ended]
    rest = {f"{number:04d}" for number in range(12)} - {f"{int(number):04d}" for number in seen[1]}
    assert sorted([*run_by[0], *run_by[1]]) == sorted(rest)  # each by one of the two
    assert len({each["values"]["optimizer.learning_rate"] for each in found}) == 12
    assert ended[0].stdout == ended[1].stdout


def masters(folder: Path) -> list[str]:
    """Those that run, by what they hold: a killed one's file is removed by the next."""
    return [path.name for path in (folder / "out" / "masters").glob("*")]


def test_a_job_that_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    write_sweep(tmp_path, RATE, task='name = "sleepy:Task"\noptions = { wrong = 1 }')
    ended = run(tmp_path)
    assert ended.code != 0 and "wrong" in ended.stderr
    assert not (tmp_path / "out").exists()
    refused = run_command(python("-m", "ddp", "sweep", "sweep.toml"), tmp_path)
    assert refused.code == 2 and "--allow-import sleepy" in refused.stderr


def test_a_trials_environment_says_nothing_of_its_masters_place(tmp_path: Path) -> None:
    around = {"SLURM_STEP_ID": "3", "RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2", "HOME": "/h"}
    request = Request("a/trial-0001", (), tmp_path / "outcome.json", tmp_path / "log", devices=(2, 3))
    assert request.environment(around) == {
        "HOME": "/h",
        "DDP_OUTCOME_FILE": str(tmp_path / "outcome.json"),
        "DDP_NO_REPORT": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }
    given = request.environment({"CUDA_VISIBLE_DEVICES": "1,4,5,GPU-7c"})
    assert given["CUDA_VISIBLE_DEVICES"] == "5,GPU-7c"  # of the master's own, not the machine's
