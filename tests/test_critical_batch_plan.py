"""Which trials a search asks for, played through in worlds whose answer is known; its file, its record, its targets."""

from __future__ import annotations

import math
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddp.errors import JobFileError, UsageError
from ddp.job import parse_job
from ddp.search.curve import next_look
from ddp.search.pilot import PILOT_STEPS, choose_targets, wanted_pilots
from ddp.search.plan import Grid, wanted
from ddp.search.request import Trial
from ddp.search.store import TrialResult, read_fact, read_trials, remove_failed, write_fact, write_trial
from ddp.search.sweep_file import Sweep, SweepSection, load_sweep

TARGETS = (1.0, 0.5)
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def sweep_of(rate: float = 0.1, optimizer: str = "sgd", **section: Any) -> Sweep:
    job = parse_job(
        {
            "run": {"steps": 1},
            "task": {"name": "quadratic"},
            "batch": {"global_batch_size": 64},
            "optimizer": {"name": optimizer, "learning_rate": rate},
            "evaluation": {"metric": "distance"},
        }
    )
    return Sweep(SweepSection.model_validate(section), job, "sweep")


def answer(trial: Trial, steps: tuple[float, ...], because: Any = "targets", loss: float = 0.4) -> TrialResult:
    unknown = (math.nan,) * len(steps)
    return TrialResult(
        optimizer="sgd",
        batch_size=trial.batch_size,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        method=trial.method,
        targets=trial.targets,
        steps_to_target=steps,
        examples_to_target=tuple(each * trial.batch_size for each in steps),
        validation_loss_at_target=unknown,
        validation_metric_at_target=unknown,
        seconds=1.0,
        seconds_per_step=0.01,
        peak_memory_bytes=1,
        diverged=because == "diverged",
        stopped_because=because,
        curve=((0, 2.0), (100, loss)),
        noise_plain=unknown,
        noise_preconditioned=unknown,
        steps=100,
    )


def world(
    best_rate: Callable[[int, int], float], bend: float = 0.4, noise: float = 0.03
) -> Callable[[Trial], TrialResult]:
    """Steps rise with the square of log2(rate / best rate of (batch size, target)); four times the best diverges."""

    def run(trial: Trial) -> TrialResult:
        generator = random.Random(repr(trial.key))
        steps: list[float] = []
        for index in range(len(trial.targets)):
            off = math.log2(trial.learning_rate / best_rate(trial.batch_size, index))
            if off >= 2:
                return answer(trial, (math.nan,) * len(trial.targets), "diverged")
            needed = 50 * (index + 1) * (1 + 100 / trial.batch_size) * (1 + bend * off * off)
            steps.append(needed * math.exp(noise * generator.gauss(0, 1)))
        given_up = steps[-1] > min(trial.hopeless_steps, trial.maximum_steps)
        limit = min(trial.hopeless_steps, trial.maximum_steps)
        reached = tuple(each if each <= limit else math.nan for each in steps)
        return answer(trial, reached, "hopeless" if given_up else "targets", loss=0.5 + given_up * steps[-1] / 1e6)

    return run


def play(
    sweep: Sweep, run: Callable[[Trial], TrialResult], workers: int = 3, order: int = 0
) -> tuple[list[TrialResult], list[Trial]]:
    """The loop of a search without processes: trials end in a random order; none may be asked for twice."""
    generator = random.Random(order)
    done: list[TrialResult] = []
    asked: list[Trial] = []
    running: list[Trial] = []
    while True:
        for trial in wanted(sweep, TARGETS, done):
            if len(running) < workers and trial.key not in {each.key for each in running}:
                running.append(trial)
                asked.append(trial)
        if not running:
            break
        done.append(run(running.pop(generator.randrange(len(running)))))
        assert len(done) < 600, "no end"
    assert len({trial.key for trial in asked}) == len(asked)
    return done, asked


def cells(done: list[TrialResult], size: int, target: int) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for trial in done:
        if trial.batch_size == size:
            found.setdefault(trial.learning_rate, []).append(trial.steps_to_target[target])
    return found


@pytest.mark.parametrize("start", [0.1, 0.003, 4.0])
@pytest.mark.parametrize("order", [0, 1])
def test_the_best_learning_rate_ends_up_inside_with_all_seeds(start: float, order: int) -> None:
    def best_rate(size: int, target: int) -> float:
        return 0.3 / (1 + 100 / size) / (1 + target)

    sweep = sweep_of(start)
    done, _ = play(sweep, world(best_rate), order=order)
    for size in sweep.section.batch_sizes:
        for target in range(2):
            found = cells(done, size, target)
            steps = {rate: values for rate, values in found.items() if all(map(math.isfinite, values))}
            means = {rate: math.fsum(map(math.log, values)) / len(values) for rate, values in steps.items()}
            best = min(means, key=lambda rate: means[rate])
            assert len(steps[best]) == 3
            # Within the grid's resolution of the truth, a step of which costs 10 %.
            assert abs(math.log2(best / best_rate(size, target))) <= 0.75
            for neighbour in (best * math.sqrt(2), best / math.sqrt(2)):
                close = [values for rate, values in found.items() if math.isclose(rate, neighbour, rel_tol=1e-9)]
                assert close, "the best is at an end of the grid"
                assert len(close[0]) == 3 or not all(map(math.isfinite, close[0]))
    assert len(done) < 9 * 24


def test_racing_ends_runs_early_and_changes_no_choice() -> None:
    def best_rate(size: int, target: int) -> float:
        return 0.3 / (1 + 100 / size)

    run = world(best_rate, bend=1.5)
    raced, _ = play(sweep_of(0.1), run)
    patient, _ = play(sweep_of(0.1), lambda trial: run(replace(trial, hopeless_steps=math.inf)))
    assert any(trial.stopped_because == "hopeless" for trial in raced)
    for size in sweep_of().section.batch_sizes:
        chosen = []
        for done in (raced, patient):
            found = {rate: steps for rate, steps in cells(done, size, 1).items() if len(steps) == 3}
            finite = {rate: steps for rate, steps in found.items() if all(map(math.isfinite, steps))}
            chosen.append(min(finite, key=lambda rate: math.fsum(map(math.log, finite[rate]))))
        assert chosen[0] == chosen[1]


def test_only_first_seeds_are_raced_against_others() -> None:
    sweep = sweep_of(0.1)
    _, asked = play(sweep, world(lambda size, target: 0.1))
    later = [trial for trial in asked if trial.seed]
    assert later
    for trial in later:  # room for four times what the same learning rate took
        off = math.log2(trial.learning_rate / 0.1)
        assert trial.hopeless_steps > 3 * 100 * (1 + 100 / trial.batch_size) * (1 + 0.4 * off * off)


def test_a_batch_size_that_always_fails_is_left_alone() -> None:
    run = world(lambda size, target: 0.1)

    def fails(trial: Trial) -> TrialResult:
        return answer(trial, (math.nan, math.nan), "failed") if trial.batch_size == 1024 else run(trial)

    done, _ = play(sweep_of(0.1), fails)
    assert len([trial for trial in done if trial.batch_size == 1024]) <= 5
    assert {trial.batch_size for trial in done if trial.seed == 2} == {4 * 2**power for power in range(8)}


def test_where_nothing_reaches_the_target_the_search_ends() -> None:
    done, _ = play(sweep_of(0.1), lambda trial: answer(trial, (math.nan, math.nan), "budget", loss=1.0))
    assert done
    play(sweep_of(0.1), lambda trial: answer(trial, (math.nan, math.nan), "diverged"))


def test_given_learning_rates_are_run_as_they_are() -> None:
    sweep = sweep_of(0.1, learning_rates=[0.4, 0.1], batch_sizes=[512, 8, 64, 128, 16, 8], seeds=4)
    done, asked = play(sweep, world(lambda size, target: 0.1))
    expected = {(size, rate, seed) for size in (8, 16, 64, 128, 512) for rate in (0.1, 0.4) for seed in range(4)}
    assert {(trial.batch_size, trial.learning_rate, trial.seed) for trial in done} == expected
    assert [trial.seed for trial in asked] == sorted(trial.seed for trial in asked)


def test_the_grid_knows_its_own_points() -> None:
    grid = Grid(0.003)
    assert [grid.index(grid.rate(index)) for index in range(-30, 31)] == list(range(-30, 31))
    assert grid.rate(2) == 2 * grid.rate(0)


def pilot_curve(rate: float) -> tuple[tuple[int, float], ...]:
    points, step = [(0, 3.0)], 1
    while step < PILOT_STEPS:
        points.append((step, 3 / (1 + step * rate / (1 + (rate / 0.4) ** 4))))
        step = next_look(step)
    return (*points, (PILOT_STEPS, 3 / (1 + PILOT_STEPS * rate / (1 + (rate / 0.4) ** 4))))


def test_targets_come_from_the_best_of_the_pilots() -> None:
    sweep = sweep_of(0.05)
    done: list[TrialResult] = []
    while trials := wanted_pilots(sweep, done):
        assert trials[0].batch_size == 1024 and trials[0].maximum_steps == PILOT_STEPS
        result = answer(trials[0], ())
        done.append(TrialResult(**{**{name: getattr(result, name) for name in TrialResult.__slots__}, "curve": pilot_curve(trials[0].learning_rate)}))  # fmt: skip
    assert {round(trial.learning_rate, 6) for trial in done} >= {0.1, 0.2, 0.4}  # the best, 0.2 or 0.4, is inside
    assert min(trial.learning_rate for trial in done) <= 0.2 and Grid(0.05).rate(5) in {
        trial.learning_rate for trial in done
    }  # half way beside the best too, as in the search
    best = max(rate / (1 + (rate / 0.4) ** 4) for rate in (0.05, 0.1, 0.2, Grid(0.05).rate(5), 0.4))
    assert choose_targets(sweep, done) == pytest.approx([3 / (1 + steps * best) for steps in (38, 48, 64)], rel=0.01)
    with pytest.raises(UsageError, match="set optimizer.learning_rate"):
        choose_targets(sweep, [])


def test_trials_come_back_from_the_record_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "sweep.db"
    assert read_trials(path) == [] and read_fact(path, "targets") is None
    first = answer(Trial("sweep", 4, 0.1, 0, TARGETS, 9), (12.5, math.inf))
    failed = answer(Trial("sweep", 4, 0.2, 0, TARGETS, 9), (1.0, 2.0), "failed")
    for trial in (first, failed, first):
        write_trial(path, trial)
    write_fact(path, "targets", [1.0, 0.5])
    again = {trial.learning_rate: trial for trial in read_trials(path)}
    assert repr(again[0.1]) == repr(first)  # NaN is not equal to itself
    assert len(again) == 2 and read_fact(path, "targets") == [1.0, 0.5]
    assert remove_failed(path) == 1 and list(map(repr, read_trials(path))) == [repr(first)]
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(UsageError, match="version 99"):
        read_trials(path)
    path.write_text("no database, but long enough to be told from an empty one")
    with pytest.raises(UsageError, match="cannot be used"):
        read_trials(path)


JSON_COLUMNS = (
    "targets", "steps_to_target", "examples_to_target", "validation_loss_at_target", "validation_metric_at_target",
    "curve", "noise_plain", "noise_preconditioned",
)  # fmt: skip


def test_the_record_holds_json_that_others_can_read(tmp_path: Path) -> None:
    """SQLite's own functions, as of any other reader, know neither NaN nor infinity."""
    path = tmp_path / "sweep.db"
    trial = replace(
        answer(Trial("sweep", 4, 0.1, 0, TARGETS, 9), (12.5, math.nan), "diverged", loss=math.inf),
        noise_plain=(-math.inf, 3.0),
        seconds_per_step=math.nan,
    )
    write_trial(path, trial)
    with closing(sqlite3.connect(path)) as database:
        for column in JSON_COLUMNS:
            assert database.execute(f"SELECT json_valid({column}) FROM trials").fetchall() == [(1,)], column
        assert database.execute("SELECT json_extract(steps_to_target, '$[1]') FROM trials").fetchall() == [("nan",)]
    assert list(map(repr, read_trials(path))) == [repr(trial)]


def test_a_record_with_the_literals_of_before_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "sweep.db"
    trial = answer(Trial("sweep", 4, 0.1, 0, TARGETS, 9), (12.5, math.nan), "diverged", loss=math.inf)
    write_trial(path, trial)
    with closing(sqlite3.connect(path)) as database, database:
        for column in JSON_COLUMNS:
            database.execute(
                f"UPDATE trials SET {column} = replace(replace({column}, '\"nan\"', 'NaN'), '\"inf\"', 'Infinity')"
            )
        (steps, curve), *_ = database.execute("SELECT steps_to_target, curve FROM trials").fetchall()
        assert (steps, curve) == ("[12.5, NaN]", "[[0, 2.0], [100, Infinity]]")
    assert list(map(repr, read_trials(path))) == [repr(trial)]


SWEEPS = sorted(EXAMPLES.glob("critical_batch_*[!n].toml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_example_sweeps_are_valid(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.job.task.name == path.stem.rpartition("_")[2]
    assert sweep.section.batch_sizes[-1] >= 64 * sweep.section.batch_sizes[0]


def test_a_sweep_may_name_a_job_file_or_hold_its_tables(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        '[run]\nsteps = 9\n[task]\nname = "digits"\n[batch]\nglobal_batch_size = 32\nmicro_batch_size = 8\n'
    )
    (tmp_path / "named.toml").write_text(
        '[sweep]\njob = "job.toml"\ntargets = [0.1, 0.4]\nbatch_sizes = [256, 4, 16, 8, 64, 4]\n'
    )
    sweep = load_sweep(tmp_path / "named.toml", ["task.channels=7", "sweep.seeds=5"])
    assert (sweep.section.targets, sweep.section.batch_sizes, sweep.section.seeds) == (
        (0.4, 0.1),
        (4, 8, 16, 64, 256),
        5,
    )
    assert (sweep.micro_batch_size, sweep.job_batch_size, sweep.directory) == (8, 32, Path("sweeps/named"))
    assert getattr(sweep.job.task, "channels", None) == 7
    other = load_sweep(tmp_path / "named.toml", ["task.channels=7", "sweep.seeds=5", "sweep.workers=3"])
    assert other.definition() == sweep.definition()
    assert load_sweep(tmp_path / "named.toml").definition() != sweep.definition()
    redrawn = load_sweep(
        tmp_path / "named.toml", ["task.channels=7", "sweep.seeds=5", "initialisation.weights=orthogonal"]
    )
    assert redrawn.definition() != sweep.definition()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[task]\nname = "digits"', "no \\[sweep\\] table"),
        ("[sweep]\nbatch_size = [4]", "sweep.batch_size: unknown key \\(did you mean batch_sizes\\?\\)"),
        ("[sweep]\nbatch_sizes = [4, 128]", "sweep.batch_sizes: the largest must be at least 64 times the smallest"),
        ("[sweep]\nbatch_sizes = [4, 16, 64, 256, 4]", "sweep.batch_sizes: a fit takes at least 5 different ones"),
        ("[sweep]\nseeds = 2", "sweep.seeds: 2: Input should be greater than or equal to 3"),
        ("[sweep]\ntargets = []", "targets is empty"),
        ("[sweep]\ntargets = [-1.0]", "^[^\n]*sweep.targets: -1.0: Input should be greater than 0$"),
        ("[sweep]\ntargets = [nan, 1.0]", "^[^\n]*sweep.targets: nan: Input should be a finite number$"),
        ('[sweep]\njob = "none.toml"', "none.toml: cannot read the job file: No such file"),
        ('[sweep]\njob = "x.toml"\n[task]\nname = "digits"', "task is here too"),
        ("[sweep]\n[batch]\nglobal_batch_size = 64", "task: missing"),
        ("[sweep", "not valid TOML"),
    ],
)
def test_a_bad_sweep_file_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(JobFileError, match=message):
        load_sweep(tmp_path / "sweep.toml")
