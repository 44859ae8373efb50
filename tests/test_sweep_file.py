"""Sweep files, ranges, conditions and stages: all that is decided without running anything."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from ddp.errors import JobFileError, UsageError
from ddp.job import apply_overrides, parse_job
from ddp.sweep.dimensions import Dimension, override
from ddp.sweep.dry_run import plan_text
from ddp.sweep.space import Space
from ddp.sweep.stages import expand, plan_stage, restored_plan, steps_of
from ddp.sweep.sweep_file import Sweep, load_sweep
from ddp.sweep.trials import Trial, TrialResult, best_of, ranked

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SWEEP = """
[sweep]
trials = 8

[sweep.dimensions]
"optimizer.learning_rate" = { low = 1e-3, high = 1.0 }
optimizer.weight_decay = { low = 1e-6, high = 1e-2 }
"optimizer.momentum" = { low = 0.5, high = 0.99, when = { "optimizer.name" = "sgd" } }
"optimizer.name" = ["sgd", "adam"]
"task.channels" = { low = 4, high = 32, points = 3 }
"task.dropout" = { low = 0, high = 0.6 }
"task.batch_norm" = [true, false]

[sweep.subjects]
rates = ["optimizer.learning_rate", "optimizer.weight_decay"]
network = ["task.channels", "task.dropout", "task.batch_norm"]

[[sweep.stages]]
name = "coarse"
epochs = 0.3
[[sweep.stages]]
name = "fine"
epochs = 5.0
narrow = 0.5

[run]
epochs = 8
[task]
name = "digits"
[batch]
global_batch_size = 64
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    (tmp_path / "s.toml").write_text(SWEEP)
    return tmp_path / "s.toml"


def space_of(sweep: Sweep) -> Space:
    return Space(sweep.dimensions, frozenset(each.key for each in sweep.dimensions), job_value=sweep.job_value)


def ended(number: int, cost: float, **values: object) -> Trial:
    keyed = {key.replace("__", "."): value for key, value in values.items()}
    return Trial("coarse", number, keyed, result=TrialResult("complete", value=cost, cost=cost))


def test_what_a_dimension_is_by_default(sweep_file: Path) -> None:
    found = {each.key: each for each in load_sweep(sweep_file).dimensions}
    assert {key: (each.kind, each.log) for key, each in found.items()} == {
        "optimizer.learning_rate": ("float", True),
        "optimizer.weight_decay": ("float", True),
        "optimizer.momentum": ("float", False),
        "optimizer.name": ("choice", False),
        "task.channels": ("int", False),
        "task.dropout": ("float", False),
        "task.batch_norm": ("choice", False),
    }
    assert found["task.channels"].grid() == [4, 18, 32]
    assert found["optimizer.learning_rate"].grid() == pytest.approx([1e-3, 10**-2.25, 10**-1.5, 10**-0.75, 1.0])
    keys = list(found)
    assert keys.index("optimizer.name") < keys.index("optimizer.momentum")  # what a condition names comes first


def test_whole_numbers_at_both_ends_of_what_takes_fractions_are_a_range(sweep_file: Path) -> None:
    text = (
        sweep_file.read_text()
        .replace('"optimizer.weight_decay" =', "")
        .replace("low = 1e-6, high = 1e-2", 'low = 0, high = 1, scale = "linear"')
    )
    sweep_file.write_text(text)
    decay = {each.key: each for each in load_sweep(sweep_file).dimensions}["optimizer.weight_decay"]
    assert (decay.kind, decay.low, decay.high, decay.log) == ("float", 0, 1, False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"optimizer.learning_rate"', '"optimizer.learning_rat"', r"unknown key \(did you mean learning_rate\?\)"),
        ("trials = 8", "trails = 8", r"sweep.trails: unknown key \(did you mean trials\?\)"),
        ("points = 3", "pints = 3", r"pints: unknown key \(did you mean points\?\)"),
        ("low = 1e-6", "low = 0.0", r"weight_decay.*: low 0 must be above 0 on a log scale"),
        ("low = 4, high = 32", "low = 32, high = 4", r"low 32 must be below high 4"),
        ("low = 4, high = 32", "low = -4, high = 32", r"task.channels: should be greater than 0.*\n.*task.channels=-4"),
        ('["sgd", "adam"]', '["sgd", "adm"]', r"'adm' is not valid.*did you mean adam"),
        (
            '"optimizer.name" = "sgd"',
            '"optimizer.nme" = "sgd"',
            r"optimizer.nme is no dimension \(did you mean optimizer.name",
        ),
        (
            '"optimizer.name" = "sgd"',
            '"optimizer.name" = ["sgd", "adamw"]',
            r"momentum.when: optimizer.name is never \"adamw\": its values are \"sgd\", \"adam\"",
        ),
        ('network = ["task.channels"', 'network = ["task.chanels"', r"subjects.network: task.chanels is no dimension"),
        ("epochs = 0.3", "epochs = 0.3\nsteps = 3", r"stages.0: give either epochs or steps"),
        ("epochs = 0.3", 'set = ["evaluation.every_step=3"]', r"stages.coarse.set.*every_step: unknown key"),
        ('name = "fine"', 'name = "coarse"', "coarse is there twice"),
        ("trials = 8", "batch_sizes = [4]", "belongs to `ddp critical-batch`"),
        ("trials = 8", 'sampler = "tpee"', r"did you mean tpe"),
        ('"task.channels" = {', '"run.id" = {', "run.id is the sweep's own"),
        ("trials = 8", 'job = "x.toml"', "sweep.job names a job file, and batch, run, task is here too"),
    ],
)
def test_a_bad_sweep_file_is_refused_before_anything_starts(sweep_file: Path, old: str, new: str, message: str) -> None:
    text = sweep_file.read_text()
    assert old in text
    sweep_file.write_text(text.replace(old, new))
    with pytest.raises(JobFileError, match=message):
        load_sweep(sweep_file)


def test_conditions_in_a_circle(sweep_file: Path) -> None:
    one = '"optimizer.name" = { values = ["sgd", "adam"], when = { "optimizer.momentum" = 0.5 } }'
    sweep_file.write_text(sweep_file.read_text().replace('"optimizer.name" = ["sgd", "adam"]', one))
    with pytest.raises(UsageError, match=r"conditions of .*optimizer.momentum.* go in a circle"):
        load_sweep(sweep_file)


def test_a_grid_has_every_combination_once_and_conditional_values_where_they_count(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    grid = space_of(sweep).grid()
    assert len(grid) == 5 * 5 * (5 + 1) * 3 * 5 * 2  # sgd with five momenta, adam without
    assert len({repr(sorted(each.items())) for each in grid}) == len(grid)
    assert Counter("optimizer.momentum" in each for each in grid)[False] == 5 * 5 * 3 * 5 * 2
    assert all(("optimizer.momentum" in each) == (each["optimizer.name"] == "sgd") for each in grid)
    for values in grid[::97]:
        job = parse_job(apply_overrides(sweep.table, [override(key, value) for key, value in values.items()]))
        assert job.optimizer.learning_rate == values["optimizer.learning_rate"]
        assert job.optimizer.name == values["optimizer.name"]


def test_a_range_is_halved_around_the_best_by_its_scale_and_stays_inside() -> None:
    log = Dimension("x", "float", low=1e-4, high=1.0, log=True)
    inside = log.narrowed(log, 1e-2, 0.5)
    assert (inside.low, inside.high) == pytest.approx((1e-3, 1e-1))
    at_the_edge = log.narrowed(log, 0.5, 0.5)
    assert (at_the_edge.low, at_the_edge.high) == pytest.approx((0.05, 1.0))
    again = inside.narrowed(log, 1e-1, 0.5)  # beyond the narrowed range, within the whole
    assert (again.low, again.high) == pytest.approx((10**-1.5, 10**-0.5))
    whole = Dimension("n", "int", low=1, high=9)
    assert [(each.low, each.high) for each in (whole.narrowed(whole, 4, 0.25), whole.narrowed(whole, 9, 0.1))] == [
        (3, 5),
        (8, 9),
    ]


def test_borders() -> None:
    log = Dimension("x", "float", low=1e-4, high=1.0, log=True)
    assert [log.border(value) for value in (1e-4, 1.5e-4, 1e-2, 0.8, 1.0)] == ["lower", "lower", None, "upper", "upper"]
    numbers = Dimension("x", "choice", choices=("8", "64", "16"))
    assert [numbers.border(value) for value in (8, 16, 64)] == ["lower", None, "upper"]
    assert Dimension("x", "choice", choices=('"a"', '"b"')).border("a") is None
    assert Dimension("x", "int", low=1, high=4).border(1) == "lower"


@pytest.mark.parametrize(
    ("dimension", "lower", "upper"),
    [
        (Dimension("task.channels", "choice", choices=("8", "16", "64")), True, True),
        (Dimension("task.channels", "choice", choices=("2", "64")), True, True),
        (Dimension("task.channels", "choice", choices=("1", "2")), False, True),
        (Dimension("task.channels", "int", low=1, high=9), False, True),
        (Dimension("optimizer.learning_rate", "choice", choices=("0.01", "1e-4", "0.001")), True, True),
        (Dimension("optimizer.learning_rate", "float", low=0.001, high=1.0), True, True),
        (Dimension("optimizer.momentum", "float", low=0.5, high=0.99), True, True),
        (Dimension("task.dropout", "choice", choices=("0.0", "0.2", "0.4")), False, True),
        (Dimension("task.dropout", "float", low=0.0, high=0.4), False, True),
    ],
)
def test_the_job_is_asked_for_what_lies_just_beyond_a_border(
    sweep_file: Path, dimension: Dimension, lower: bool, upper: bool
) -> None:
    """Ranges and lists that the job ends itself, on one side, and those that it would take more of."""
    sweep = load_sweep(sweep_file, ["optimizer.name=momentum"])
    assert sweep.accepts({dimension.key: dimension.beyond("lower")}) == lower
    assert sweep.accepts({dimension.key: dimension.beyond("upper")}) == upper


def test_stages_narrow_around_the_best_of_the_stage_before(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    coarse, fine = expand(sweep)
    first = plan_stage(sweep, coarse, ())
    assert (first.trials, first.space.dimensions) == (8, sweep.dimensions)
    rates = (0.01, 0.1, 0.3)
    trials = [
        ended(n, n, optimizer__learning_rate=rate, optimizer__name="adam", task__channels=20)
        for n, rate in enumerate(rates)
    ]
    before = [(coarse, {each.key: each for each in sweep.dimensions}, trials)]
    plan = plan_stage(sweep, fine, before)
    ranges = {each.key: each for each in plan.space.dimensions}
    rate = ranges["optimizer.learning_rate"]
    assert math.log(rate.high / rate.low) == pytest.approx(0.5 * math.log(1e3))
    assert math.sqrt(rate.high * rate.low) == pytest.approx(0.01)
    assert (ranges["task.channels"].low, ranges["task.channels"].high) == (13, 27)
    assert ranges["optimizer.name"].choices == ('"adam"',)  # all of the leading ones had it
    assert ranges["optimizer.momentum"].low == 0.5  # the best has none: as wide as before
    assert restored_plan(sweep, fine, plan.to_json()) == plan


def test_subjects_in_turn_keep_the_others_at_their_best(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file, ["sweep.order=in_turn"])
    stages = expand(sweep)
    assert [each.name for each in stages] == ["coarse-rates", "coarse-network", "fine-rates", "fine-network"]
    assert stages[1].varied == {"task.channels", "task.dropout", "task.batch_norm"}
    best = ended(0, 0.1, optimizer__learning_rate=0.02, optimizer__weight_decay=1e-4)
    other = ended(1, 0.2, optimizer__learning_rate=0.5, optimizer__weight_decay=1e-4)
    plan = plan_stage(sweep, stages[1], [(stages[0], {each.key: each for each in sweep.dimensions}, [other, best])])
    assert plan.space.fixed == best.values
    drawn = plan.space.fill(lambda each: each.grid()[0])
    assert drawn["optimizer.learning_rate"] == 0.02
    assert "optimizer.name" not in drawn  # never varied: the job's own
    text = plan_text(sweep)
    assert "fine-rates: 8 trials, random, 5 epochs, 1 rank each" in text
    assert "0.5 times as wide around the best" in text


def test_a_condition_may_name_a_key_that_is_not_searched(sweep_file: Path) -> None:
    text = sweep_file.read_text().replace('"optimizer.name" = ["sgd", "adam"]\n', "")
    sweep_file.write_text(text)
    assert all("optimizer.momentum" not in each for each in space_of(load_sweep(sweep_file)).grid()[:50])  # adamw
    sweep_file.write_text(f'{text}\n[optimizer]\nname = "sgd"\n')
    assert all("optimizer.momentum" in each for each in space_of(load_sweep(sweep_file)).grid()[:50])


def test_a_condition_is_of_the_job_as_the_stage_has_it(sweep_file: Path) -> None:
    text = sweep_file.read_text().replace('"optimizer.name" = ["sgd", "adam"]\n', "")
    sweep_file.write_text(text.replace("epochs = 0.3", 'sampler = "grid"\nset = ["optimizer.name=sgd"]'))
    sweep = load_sweep(sweep_file)
    coarse, fine = (plan_stage(sweep, stage, ()) for stage in expand(sweep))
    assert all("optimizer.momentum" in values for values in coarse.grid)
    assert "optimizer.momentum" not in fine.space.fill(lambda each: each.grid()[0])  # adamw, the job's own


def test_a_condition_means_the_number_however_it_is_written(sweep_file: Path) -> None:
    """The job's dropout is 0.0, and true is no number."""
    text = (
        sweep_file.read_text().replace('"task.dropout" = { low = 0, high = 0.6 }\n', "").replace('"task.dropout", ', "")
    )
    met = text.replace("high = 1e-2", 'high = 1e-2, when = { "task.dropout" = 0, "task.batch_norm" = true }')
    sweep_file.write_text(met)
    grid = space_of(load_sweep(sweep_file)).grid()
    assert all(("optimizer.weight_decay" in each) == each["task.batch_norm"] for each in grid)
    sweep_file.write_text(met.replace('"task.batch_norm" = true }', '"task.batch_norm" = 1 }'))
    with pytest.raises(JobFileError, match="task.batch_norm is never 1: its values are true, false"):
        load_sweep(sweep_file)


def test_ranking() -> None:
    pruned = Trial("a", 3, {}, result=TrialResult("pruned", cost=0.0))
    lost = [Trial("a", 4, {}, result=TrialResult("failed")), Trial("a", 5, {}, result=TrialResult("diverged"))]
    trials = [ended(0, 2.0), pruned, *lost, Trial("a", 6, {}), ended(1, 1.0), ended(2, 1.0)]
    assert [trial.number for trial in ranked(trials)] == [1, 2, 0, 3, 5, 4]
    assert best_of(trials) == ended(1, 1.0)
    assert best_of([pruned]) is None


def test_a_part_of_an_epoch_in_steps() -> None:
    assert [steps_of(epochs, 1000, 64) for epochs in (0.001, 0.5, 1.0, 2.5)] == [1, 8, 16, 40]


def test_the_definition_holds_what_numbers_depend_on(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    same = load_sweep(sweep_file, ["sweep.workers=3", "sweep.trials=30", "sweep.keep=1", "metrics.port=9000"])
    assert sweep.definition() == same.definition()
    for changed in ("sweep.seed=1", "optimizer.gradient_clip_norm=2.0", "sweep.narrow=0.2"):
        assert sweep.definition() != load_sweep(sweep_file, [changed]).definition()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("sweep_*.toml")), ids=lambda path: path.name)
def test_the_examples_are_valid(example: Path) -> None:
    assert plan_text(load_sweep(example))
