"""Branches from a checkpoint: what they begin with, which are run, what they cost and find against a sweep."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp import checkpoint
from ddp.errors import CheckpointError, UsageError
from ddp.noise.critical_batch import critical_batch
from ddp.search import branch_plan, branched
from ddp.search.branch_plan import BranchPlan
from ddp.search.branch_point import read_branch_point
from ddp.search.branched import search_branches
from ddp.search.critical_batch import targets_in
from ddp.search.findings import cells_of, findings, fit_of, read_findings
from ddp.search.findings_text import in_words
from ddp.search.request import Trial
from ddp.search.segment import check_comparable, compare_in, compare_on_segment, comparisons, steps_between
from ddp.search.store import TrialResult, read_trials, write_fact, write_trial
from ddp.search.sweep_file import Sweep, load_sweep
from ddp.search.trial import run_trial
from ddp.search.workload import load_workload
from jobs import python, run_command

TABLES = """
[task]
name = "digits"
channels = 3
batch_norm = true

[batch]
global_batch_size = 16
micro_batch_size = 8

[optimizer]
name = "adam"
learning_rate = 0.03
"""
JOB = f"""
[run]
id = "run"
steps = 12
device = "cpu"
threads_per_rank = 1
{TABLES}
[metrics]
enabled = false
"""
SWEEP = f"""
[sweep]
directory = "out"
batch_sizes = [4, 8, 16, 32, 64, 128, 256]
targets = [3.0, 1.0]
subset_examples = 64
maximum_examples = 6400
workers = 1
{TABLES}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 12 steps, its checkpoint, and a sweep file of the same task."""
    folder = tmp_path_factory.mktemp("branched")
    (folder / "job.toml").write_text(JOB)
    (folder / "sweep.toml").write_text(SWEEP)
    command = [sys.executable, "-m", "ddp", "train", "job.toml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def origin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return checkpoint.find(folder / "runs/run/checkpoints", 12)


@pytest.fixture
def sweep(origin: Path) -> Sweep:
    return load_sweep("sweep.toml")


# --- where branches begin -------------------------------------------------------------------------------------------


def test_the_branch_point_is_the_runs(origin: Path, sweep: Sweep) -> None:
    point = read_branch_point(origin, sweep)
    assert (point.origin, point.step, point.batch_size) == (str(origin), 12, 16)
    assert point.learning_rate == 0.03


def test_a_branch_goes_on_with_the_runs_weights_and_moments(origin: Path, sweep: Sweep) -> None:
    """Two steps at 3 times the batch, compared with torch's own Adam from the same checkpoint and order."""
    from ddp.search.training_step import stream

    trial = Trial("branched", 48, 0.01, 1, (), 2, origin=str(origin), multiple=3.0)
    workload = load_workload(sweep, allow_import=())
    result = run_trial(workload, trial)
    assert (result.origin, result.multiple, result.steps) == (str(origin), 3.0, 2)

    shared, own = checkpoint.load(origin, 0)
    model = workload.task.model()
    model.load_state_dict({**shared["parameters"], **own["buffers"]})
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(shared["optimizer"])
    optimizer.param_groups[0].update(lr=0.01, fused=False)
    subset = np.sort(np.random.default_rng((0, 1)).permutation(1472)[:64])
    losses = [_loss_in_parts(workload, model, subset)]
    batches = stream(1472, 1, 48)
    for _ in range(2):
        optimizer.zero_grad()
        chosen = next(batches)
        for start in range(0, 48, 8):  # batch statistics over the job's micro-batches of 8
            batch = workload.training.__getitems__(chosen[start : start + 8])  # type: ignore[attr-defined]
            (workload.task.loss(model, batch).mean() / 6).backward()
        optimizer.step()
        losses.append(_loss_in_parts(workload, model, subset))
    assert [step for step, _ in result.curve] == [0, 1, 2]
    assert [loss for _, loss in result.curve] == pytest.approx(losses, rel=1e-4)
    fresh = run_trial(workload, replace(trial, origin=""))
    assert fresh.curve[0][1] > 1.1 * losses[0]


def _loss_in_parts(workload, model: torch.nn.Module, subset: np.ndarray) -> float:  # noqa: ANN001
    model.train()
    with torch.no_grad():
        parts = [workload.training.__getitems__(subset[start : start + 8].tolist()) for start in range(0, 64, 8)]
        return float(torch.cat([workload.task.loss(model, part) for part in parts]).mean())


def test_a_checkpoint_of_something_else_is_refused(origin: Path, sweep: Sweep) -> None:
    with pytest.raises(UsageError, match=r"a run of optimizer adam, and the sweep file has optimizer.name = 'sgd'"):
        read_branch_point(origin, load_sweep("sweep.toml", ["optimizer.name=sgd"]))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_branch_point(origin.with_name("step-00000013"), sweep)
    wider = load_sweep("sweep.toml", ["task.channels=4"])
    trial = Trial("branched", 8, 0.01, 0, (), 1, origin=str(origin), multiple=0.5)
    with pytest.raises(
        UsageError, match=r"belongs to another model: 0.weight is \[3, 1, 3, 3\] there and \[4, 1, 3, 3\]"
    ):
        run_trial(load_workload(wider, allow_import=()), trial)


def test_a_run_whose_schedule_is_over_is_no_beginning(origin: Path, sweep: Sweep) -> None:
    """A cosine has come down to 0 in its last step: branches at multiples of that would not move."""
    for name, steps in (("ended", 4), ("under-way", 3)):
        command = python("-m", "ddp", "train", "job.toml", "--set", f"run.id={name}", "--set", "schedule.name=cosine")
        command += ["--set", "run.steps=4", "--set", f"checkpoint.every_steps={steps}"]
        assert run_command(command, Path.cwd(), timeout=120).code == 0
    read = read_branch_point(Path("runs/under-way/checkpoints/step-00000003"), sweep)
    assert 0 < read.learning_rate < 0.03
    with pytest.raises(
        UsageError, match=r"learning rate is 0 here, its schedule is over: .* give an earlier checkpoint"
    ):
        read_branch_point(Path("runs/ended/checkpoints/step-00000004"), sweep)


# --- which are run --------------------------------------------------------------------------------------------------

START, END = 0.9, 0.5
EARLY = 60


def simulate(trial: Trial, critical: float, best_rate: Callable[[float], float], noise: float = 0.03) -> TrialResult:
    """A loss that falls by a factor e in tau = 60 (1 + B_crit/B) steps at the best learning rate."""
    generator = np.random.default_rng([trial.batch_size, round(1e6 * trial.learning_rate), trial.seed])
    ratio = trial.learning_rate / best_rate(trial.batch_size)
    valley = 1 / (2 * ratio - ratio**2) if ratio < 1.9 else math.inf
    tau = 60 * (1 + critical / trial.batch_size) * valley * math.exp(noise * generator.standard_normal())
    first = START if trial.origin else 2.3
    needed = 1.3 * (tau * math.log(first / trial.targets[-1]) + EARLY)
    last = min(trial.maximum_steps, max(1.0, trial.hopeless_steps), needed)
    looks = np.unique(np.geomspace(1, max(1, last), 150).astype(int))
    curve = ((0, first), *((int(step), first * math.exp(-step / tau)) for step in looks))
    unknown = (math.nan,) * len(trial.targets)
    steps = tuple(tau * math.log(first / t) for t in trial.targets)
    reached = tuple(each if 1.15 * each < looks[-1] else math.nan for each in steps)
    return TrialResult(
        optimizer="sgd",
        batch_size=trial.batch_size,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        method=trial.method,
        targets=trial.targets,
        steps_to_target=reached,
        examples_to_target=tuple(each * trial.batch_size for each in reached),
        validation_loss_at_target=unknown,
        validation_metric_at_target=unknown,
        seconds=1.0,
        seconds_per_step=0.01,
        peak_memory_bytes=1,
        diverged=math.isinf(tau),
        stopped_because="targets" if not any(map(math.isnan, reached)) else "hopeless",
        curve=curve,
        noise_plain=unknown,
        noise_preconditioned=unknown,
        steps=int(looks[-1]),
        origin=trial.origin,
        multiple=trial.multiple,
    )


def plan_from(batch_size: int, learning_rate: float, exponents: Sequence[float]) -> BranchPlan:
    sizes = tuple(int(multiple * batch_size) for multiple in branch_plan.MULTIPLES if multiple * batch_size >= 1)
    return BranchPlan("/run", batch_size, learning_rate, sizes, tuple(exponents), 3, 1_000_000)


def complete(plan: BranchPlan, run: Callable[[Trial], TrialResult]) -> list[TrialResult]:
    done: list[TrialResult] = []
    while wanted := plan.wanted((END,), done):
        assert len(done) < 300
        done.append(run(wanted[0]))
    return done


@pytest.mark.parametrize("exponents", [branch_plan.EXPONENTS["sgd"], branch_plan.ROOT])
@pytest.mark.parametrize("off", [0.4, 1.0, 2.5])
def test_the_plan_finds_the_critical_batch_size(exponents: tuple[float, ...], off: float) -> None:
    """Also from a run whose learning rate was off: the best is looked for until it lies inside."""
    best = lambda size: 0.5 / (1 + 50 / size)  # noqa: E731
    done = complete(plan_from(32, off * best(32), exponents), lambda trial: simulate(trial, 50.0, best))
    keys = [(trial.batch_size, trial.learning_rate, trial.seed) for trial in done]
    assert len(set(keys)) == len(keys) < 70
    rates = {(size, rate) for size, rate, _ in keys}
    assert all(a != c or abs(math.log(b / d)) > 0.01 for a, b in rates for c, d in rates if (a, b) < (c, d))
    found = critical_batch(cells_of(done, [trial.steps_to_target[-1] for trial in done]))
    assert found.critical_batch_size is not None, found.reason
    assert found.critical_batch_size.value == pytest.approx(50, rel=0.12)
    assert all(each.interior and each.seeds == 3 for each in found.best)
    tried = sorted({size for size, _, _ in keys})
    assert (tried[0], tried[-1]) == (16, 256)  # the bend lies inside, and no batch size goes far beyond


def test_the_rules_learning_rates() -> None:
    def rates(exponents: Sequence[float], size: int, own: float = 0.1) -> list[float]:
        plan = plan_from(32, 0.1, exponents)
        return [plan.grid.rate(index) for index in plan.rule(size, plan.grid.index(own))]

    assert rates(branch_plan.EXPONENTS["sgd"], 512) == pytest.approx([0.1, 0.4, 1.6])
    assert rates(branch_plan.EXPONENTS["sgd"], 32) == [0.1]
    assert rates(branch_plan.ROOT, 8) == pytest.approx([0.05])
    assert rates(branch_plan.ROOT, 128, 0.2) == pytest.approx([0.4])


def test_every_learning_rate_of_a_rule_lies_on_one_grid() -> None:
    """However it is come by it is one number, or a batch size would be run twice at what is all but one rate."""
    for exponents in (branch_plan.EXPONENTS["sgd"], branch_plan.ROOT):
        plan = plan_from(64, 0.08, exponents)
        for size in plan.batch_sizes:
            for own in range(-branch_plan.FARTHEST, branch_plan.FARTHEST + 1):
                exact = sorted({plan.grid.rate(own) * (size / 64) ** exponent for exponent in exponents})
                assert [plan.grid.rate(index) for index in plan.rule(size, own)] == pytest.approx(exact, rel=1e-12)
                assert plan.grid.index(plan.grid.rate(own)) == own


def test_the_rules_learning_rates_are_all_tried_however_few_run_side_by_side() -> None:
    plan = plan_from(32, 0.1, branch_plan.EXPONENTS["sgd"])
    best = lambda size: 0.1  # noqa: E731
    done = complete(plan, lambda trial: simulate(trial, 50.0, best))
    own = plan.grid.index(_best_rate(done, 32))
    for size in {trial.batch_size for trial in done}:
        tried = {plan.grid.index(trial.learning_rate) for trial in done if trial.batch_size == size}
        assert tried >= set(plan.rule(size, own))


def _best_rate(done: Sequence[TrialResult], size: int) -> float:
    first = [trial for trial in done if (trial.batch_size, trial.seed) == (size, 0)]
    return min(first, key=lambda trial: np.nan_to_num(trial.steps_to_target[-1], nan=math.inf)).learning_rate


def test_what_was_run_before_there_was_a_grid_is_not_run_again() -> None:
    """Learning rates rounded to nine digits, of which two may stand for one."""
    best = lambda size: 0.5 / (1 + 50 / size)  # noqa: E731
    plan = plan_from(32, 0.08, branch_plan.EXPONENTS["sgd"])
    done = complete(plan, lambda trial: simulate(trial, 50.0, best))
    rounded = [replace(trial, learning_rate=float(f"{trial.learning_rate:.9g}")) for trial in done]
    twice = [replace(trial, learning_rate=trial.learning_rate * (1 - 1.3e-9)) for trial in rounded if not trial.seed]
    assert plan.wanted((END,), [*rounded, *twice]) == []
    once, both = (
        critical_batch(cells_of(each, [trial.steps_to_target[-1] for trial in each])).critical_batch_size
        for each in (done, [*rounded, *twice])
    )
    assert once is not None and both is not None
    assert both.value == pytest.approx(once.value, rel=0.03)


@pytest.mark.parametrize("critical", [4.0, 50.0, 800.0])
def test_batch_sizes_go_out_to_the_bend(critical: float) -> None:
    best = lambda size: 0.5 / (1 + critical / size)  # noqa: E731
    done = complete(plan_from(32, best(32), branch_plan.ROOT), lambda trial: simulate(trial, critical, best))
    found = fit_of(cells_of(done, [trial.steps_to_target[-1] for trial in done]), "branched")
    assert found.critical_batch_size is not None, found.reason
    assert found.critical_batch_size.value == pytest.approx(critical, rel=0.2)
    assert len(found.best) <= 10
    assert len(done) <= 9 * len(found.best)


def test_where_nothing_arrives_the_plan_ends() -> None:
    never = complete(
        plan_from(32, 0.1, branch_plan.ROOT),
        lambda trial: replace(simulate(trial, 50.0, lambda _: 1.0), steps_to_target=(math.nan,)),
    )
    assert {trial.seed for trial in never} == {0}


# --- against a sweep ------------------------------------------------------------------------------------------------


def test_a_sweep_on_the_same_stretch() -> None:
    """Of whole runs only what lies between the two losses counts: what comes before has another critical batch size."""
    best = lambda size: 0.5 / (1 + 50 / size)  # noqa: E731
    branches = complete(
        plan_from(32, best(32), branch_plan.EXPONENTS["sgd"]), lambda trial: simulate(trial, 50.0, best)
    )
    whole = [
        early_part(simulate(Trial("sweep", size, factor * best(size), seed, (END,), 10**6), 50.0, best))
        for size in (4, 8, 16, 32, 64, 128, 256, 512, 1024)
        for factor in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0)
        for seed in range(3)
    ]
    compared = compare_on_segment([*whole, *branches], [*whole, *branches])
    assert (compared.start_loss, compared.end_loss) == (START, END)
    assert compared.ratio == pytest.approx(1, abs=0.15)
    assert compared.sweep.critical_batch_size is not None
    assert compared.sweep.critical_batch_size.value == pytest.approx(50, rel=0.1)
    assert compared.sweep_examples == sum(trial.steps * trial.batch_size for trial in whole)
    assert compared.share == pytest.approx(
        sum(trial.steps * trial.batch_size for trial in branches) / compared.sweep_examples
    )
    assert comparisons([*whole, *branches]) == [compared]
    assert comparisons(whole) == comparisons(branches) == []
    text = compared.in_words()
    assert text.startswith("From training loss 0.9 to 0.5 the sweep's runs give 49 [")
    assert f"{100 * compared.share:.0f} % of the sweep's {compared.sweep_examples:,}." in text
    unrestricted = findings(whole)[0].fit.critical_batch_size
    assert unrestricted is None or unrestricted.value < 0.8 * 50
    with pytest.raises(UsageError, match="no branched trials to compare"):
        compare_on_segment(whole, whole)


def test_branches_against_a_sweep_elsewhere(origin: Path, sweep: Sweep, tmp_path: Path) -> None:
    """Its losses must be those of the same task and subset; in one directory both are compared by themselves."""
    best = lambda size: 0.5 / (1 + 50 / size)  # noqa: E731
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    with pytest.raises(UsageError, match="there/sweep.db: no sweep to compare with"):
        check_comparable(sweep, there)
    write_fact(there / "sweep.db", "definition", load_sweep("sweep.toml", ["sweep.seeds=5"]).definition())
    for size in (4, 16, 64, 256):
        write_trial(there / "sweep.db", simulate(Trial("sweep", size, best(size), 0, (END,), 10**6), 50.0, best))
        branch = Trial("branched", size, best(size), 0, (END,), 10**6, origin="/run", multiple=1.0)
        write_trial(here / "sweep.db", simulate(branch, 50.0, best))
    check_comparable(sweep, there)
    assert targets_in(there) == sweep.section.targets  # those of the definition; chosen ones are a fact of their own
    by_itself = load_sweep("sweep.toml", ['sweep.targets="auto"']).definition()
    write_fact(here / "sweep.db", "definition", by_itself)
    assert targets_in(here) == ()
    write_fact(here / "sweep.db", "targets", (2.0, 0.5))
    assert targets_in(here) == (2.0, 0.5) and targets_in(tmp_path / "nowhere") == ()
    with pytest.raises(UsageError, match="of another task, optimizer or sweep.subset_examples"):
        check_comparable(load_sweep("sweep.toml", ["sweep.subset_examples=65"]), there)
    with pytest.raises(UsageError, match="of another task, optimizer or"):
        check_comparable(load_sweep("sweep.toml", ["optimizer.name=sgd"]), there)
    assert compare_in(here) == compare_in(there) == []
    (compared,) = compare_in(here, there)
    assert (compared.start_loss, compared.end_loss) == (START, END)
    assert 0 < compared.share < 1


def test_targets_further_down_than_needed_are_left_out() -> None:
    assert branched._far_enough((3.0, 2.0, 1.0), (10.0, 60.0, 90.0)) == (3.0, 2.0)
    assert branched._far_enough((3.0, 2.0, 1.0), (10.0, math.nan, math.nan)) == (3.0, 2.0)
    assert branched._far_enough((3.0, 2.0), (10.0, 20.0)) == (3.0, 2.0)


def early_part(trial: TrialResult) -> TrialResult:
    """The run with EARLY more steps before, at the first loss: a stretch where the batch size does not matter."""
    curve = (trial.curve[0], *((step + EARLY, loss) for step, loss in trial.curve[1:]))
    return replace(trial, curve=curve, steps=trial.steps + EARLY, steps_to_target=(trial.steps_to_target[0] + EARLY,))


def test_steps_between_two_losses() -> None:
    trial = simulate(Trial("sweep", 16, 1.0, 0, (0.25,), 10**6), 16.0, lambda _: 1.0, noise=0.0)
    assert steps_between(trial, 1.0, 0.5) == pytest.approx(120 * math.log(2), rel=0.01)
    assert math.isnan(steps_between(trial, 1.0, 0.01))


# --- the whole command ----------------------------------------------------------------------------------------------


def test_the_search(origin: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs at one multiple; the target above the checkpoint's loss is left out; it goes on when asked to."""
    monkeypatch.setattr(branch_plan, "MULTIPLES", (1.0,))
    shown = io.StringIO()
    directory = search_branches(sweep, origin, stream=shown)
    trials = read_trials(directory / "sweep.db")
    assert {trial.batch_size for trial in trials} == {16}
    assert {trial.origin for trial in trials} == {str(origin)}
    assert {trial.multiple for trial in trials} == {1.0}
    assert {trial.targets for trial in trials if trial.targets} == {(1.0,)}
    assert len({trial.curve[0][1] for trial in trials}) == 1  # all begin at the same weights
    (finding,) = read_findings(directory)
    assert finding.method == "branched"
    assert "only 1 batch size reached the target" in finding.fit.reason
    assert f"from {origin}" in in_words(finding)
    (entry,) = json.loads((directory / "result.json").read_text())
    assert (entry["method"], entry["target"], entry["critical_batch_size"]) == ("branched", "loss 1", None)
    assert (directory / "report.html").is_file()
    with pytest.raises(UsageError, match="give --resume to go on"):
        search_branches(sweep, origin, stream=shown)
    search_branches(sweep, origin, resume=True, stream=shown)
    assert len(read_trials(directory / "sweep.db")) == len(trials)
    lower = load_sweep("sweep.toml", ["sweep.targets=[3.0]", "sweep.directory=other"])
    with pytest.raises(UsageError, match=r"at or below every target \(3\): give lower sweep.targets"):
        search_branches(lower, origin, stream=shown)


BOWL = """
[task]
name = "quadratic"
dimension = 64
noise = 0.3
distance = 8.0
condition_number = 20.0

[batch]
global_batch_size = 32

[optimizer]
name = "sgd"
learning_rate = 0.02

[schedule]
name = "constant"

[evaluation]
metric = "distance"
"""
BOWL_RUN = f"""
[run]
id = "bowl"
steps = 20
device = "cpu"
{BOWL}
[metrics]
enabled = false
"""


def test_the_command_finds_a_target_by_itself(tmp_path: Path) -> None:
    """No targets are given and no sweep lies there: the loss that the run itself has 100 steps later."""
    (tmp_path / "job.toml").write_text(BOWL_RUN)
    (tmp_path / "sweep.toml").write_text(f"[sweep]\ndirectory = 'out'\nsubset_examples = 16\nworkers = 2\n{BOWL}")
    trained = run_command(python("-m", "ddp", "train", "job.toml"), tmp_path, timeout=120)
    assert trained.code == 0, trained.stderr
    origin = tmp_path / "runs/bowl/checkpoints/step-00000020"
    command = python("-m", "ddp", "critical-batch", "sweep.toml", "--method", "branched", "--from", str(origin))
    ended = run_command(command, tmp_path, timeout=240)
    assert ended.code == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == "out"
    trials = read_trials(tmp_path / "out/sweep.db")
    (look,) = [trial for trial in trials if not trial.targets]
    ((target,),) = {trial.targets for trial in trials if trial.targets}
    assert target == pytest.approx(dict(look.curve)[97], rel=0.1) and target < look.curve[0][1]
    own = [trial for trial in trials if trial.targets and trial.batch_size == 32 and trial.learning_rate == 0.02]
    assert own[0].steps_to_target[0] == pytest.approx(100, rel=0.1)
    keys = {(trial.batch_size, round(8 * math.log2(trial.learning_rate / 0.02)), trial.seed) for trial in trials}
    assert len(keys) == len(trials)  # none is run twice
    (finding,) = read_findings(tmp_path / "out")
    assert in_words(finding) in ended.stdout
    assert len(finding.rows) >= 5
    again = run_command([*command, "--resume"], tmp_path, timeout=60)
    assert again.code == 0, again.stderr
    assert again.stdout == ended.stdout and len(read_trials(tmp_path / "out/sweep.db")) == len(trials)


def test_a_run_that_goes_wrong_or_falls_no_more_gives_no_target() -> None:
    curve = [(0, 2.0), *((step, 2.0 + step / 1000) for step in range(1, 121))]
    with pytest.raises(UsageError, match="/run: the run goes wrong after 50 more steps at its own learning rate"):
        branched._loss_to_reach(curve[:51], "/run")
    with pytest.raises(UsageError, match="/run: its training loss of 2 is 2.1 after 100 more steps: it does not fall"):
        branched._loss_to_reach(curve, "/run")
    assert branched._loss_to_reach([(0, 2.0), *((step, 1.0) for step in range(1, 121))], "/run") == 1.0
