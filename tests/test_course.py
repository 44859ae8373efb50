"""Where a run stands: positions, rates and sizes through changes of the batch, of the ranks and of the process."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp.job import Job, parse_job
from ddp.noise.noise_scale import Reading
from ddp.tasks.base import TensorExamples
from ddp.training.course import Course, begin_course
from ddp.training.data import BatchPlan
from ddp.transport.row import StepRow
from ranks import RankPool
from training_runs import job as regression
from training_runs import saved, steps_of, train_ranks

EXAMPLES = 61


def job(**settings: Any) -> Job:
    """`settings` are `section__key=value`; ten steps with a batch that adapts itself from 12 unless they say so."""
    table: dict[str, dict[str, Any]] = {
        "run": {"steps": 10},
        "task": {"name": "digits"},
        "batch": {"global_batch_size": "auto", "initial": 12},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
    }
    for name, value in settings.items():
        section, key = name.split("__")
        table.setdefault(section, {})[key] = value
    if "run__epochs" in settings:
        del table["run"]["steps"]
    if settings.get("batch__global_batch_size", "auto") != "auto" or "batch__examples_per_rank" in settings:
        table["batch"].pop("initial")
    if "batch__examples_per_rank" in settings:
        table["batch"].pop("global_batch_size")
    return parse_job(table)


def course_of(job: Job, ranks: int = 2) -> Course:
    batch, micro = job.batch.examples_per_step(ranks), job.batch.examples_at_once(ranks)
    return begin_course(job, BatchPlan(EXAMPLES, batch, micro, ranks, seed=3))


def resolved(noise_scale: float, observations: int) -> Reading:
    return Reading(
        "resolved", noise_scale, 0.8 * noise_scale, 1.3 * noise_scale, 1.0, noise_scale, observations, 25, 0.0, False
    )


def timed(examples: int) -> list[StepRow]:
    """Rows whose step cost 1 ms and 1 us an example."""
    work = 1e-6 * examples
    return [StepRow(examples / 2, 1.0, forward_seconds=work, all_reduce_seconds=1e-3) for _ in range(2)]


def train(course: Course, steps: int, noise_scale: float = math.nan, first: int = 0) -> list[list[int]]:
    """The examples of each step, as all its ranks took them."""
    dataset, ranks = TensorExamples(torch.arange(EXAMPLES)), course.plan.world_size
    feeds = [course.batches(dataset, rank) for rank in range(ranks)]
    taken: list[list[int]] = []
    for step in range(first, first + steps):
        data = [next(feed) for feed in feeds]
        taken.append([int(i) for each in data for batch in each.micro_batches for i in batch[0]])
        course.take(data[0])
        reading = None if math.isnan(noise_scale) else resolved(noise_scale, step + 1)
        course.learning_rate(data[0], reading)
        course.adapt(data[0], timed(data[0].global_examples), reading, step + 1)
    return taken


def test_a_batch_that_grows_takes_each_example_once_an_epoch() -> None:
    course = course_of(job(batch__largest=40))
    taken = train(course, 80, noise_scale=1e4)
    assert course.plan.global_batch_size == 40
    sizes = {len(step) for step in taken}
    assert {12, 24, 40} <= sizes and max(sizes) < 40 + 2
    flat = [example for step in taken for example in step]
    for start in range(0, len(flat) - EXAMPLES + 1, EXAMPLES):
        assert sorted(flat[start : start + EXAMPLES]) == list(range(EXAMPLES))
    assert course.epochs_done == pytest.approx(len(flat) / EXAMPLES)


def test_a_change_is_told_with_its_reason_and_what_becomes_of_the_rate() -> None:
    course = course_of(job(batch__largest=40))
    train(course, 24, noise_scale=48.0)
    (data,) = islice(course.batches(TensorExamples(torch.arange(EXAMPLES)), 0), 1)
    change = course.adapt(data, timed(12), resolved(48.0, 25), 25)
    assert change is not None and (change.step, change.before, change.after) == (25, 12, 24)
    assert change.learning_rate_factor == pytest.approx((1 + 48 / 12) / (1 + 48 / 24))
    assert change.epoch == course.epochs_done and "noise scale 48 (38-62)" in change.reason


def test_a_course_goes_on_from_its_state() -> None:
    whole, first, rest = (course_of(job(run__epochs=9, schedule__name="cosine", batch__largest=40)) for _ in range(3))
    taken = train(whole, 60, noise_scale=1e4)
    assert train(first, 37, noise_scale=1e4) == taken[:37]
    rest.load_state_dict(first.state_dict())
    assert rest.state_dict() == first.state_dict() and rest.plan == first.plan
    assert train(rest, 23, noise_scale=1e4, first=37) == taken[37:]
    assert rest.state_dict() == whole.state_dict()


def test_other_ranks_take_what_is_left_of_the_epoch() -> None:
    fixed = job(batch__global_batch_size=12, run__epochs=2)
    before, after = course_of(fixed, 2), course_of(fixed, 4)
    taken = train(before, 3)
    after.load_state_dict(before.state_dict())
    while after.epoch == 0:
        taken += train(after, 1)
    assert sorted(i for step in taken for i in step) == list(range(EXAMPLES))
    assert [len(step) for step in taken] == [12, 12, 12, 12, 13]  # one is fewer than four ranks


def test_where_fewer_are_left_than_ranks_the_epoch_ends() -> None:
    fixed = job(batch__global_batch_size=29)
    before, after = course_of(fixed, 2), course_of(fixed, 4)
    train(before, 2)  # three are left
    after.load_state_dict(before.state_dict())
    assert (before.epoch, before.position, after.epoch, after.position) == (0, 58, 1, 0)


def test_so_many_examples_a_rank_keep_the_rate_they_were_tuned_at() -> None:
    section = job(batch__examples_per_rank=6, optimizer__learning_rate_rule="linear", run__epochs=4)
    before, after = course_of(section, 2), course_of(section, 4)
    train(before, 5)
    after.load_state_dict(before.state_dict())
    (data,) = islice(after.batches(TensorExamples(torch.arange(EXAMPLES)), 0), 1)
    after.take(data)
    assert after.plan.global_batch_size == 24 and after.learning_rate(data, None) == pytest.approx(0.2)
    assert after.rate.length == 4 * 5 and after.rate.position == 5 + 5 / 3  # steps of 12, now 3 an epoch


def test_the_length_says_what_the_batch_leaves_open() -> None:
    def length(**settings: Any) -> tuple[int, int, float]:
        found = course_of(job(**settings)).length
        return found.steps, found.steps_per_epoch, found.epochs

    assert length(batch__global_batch_size=12) == (10, 5, 2.0)
    assert length(batch__global_batch_size=12, run__epochs=3) == (15, 5, 3.0)
    assert length() == (10, 0, 0.0)
    assert length(run__epochs=3) == (0, 0, 3.0)
    gains = {"optimizer__learning_rate_rule": "adascale", "optimizer__tuned_batch_size": 6}
    assert length(batch__global_batch_size=12, **gains) == (0, 5, 0.0)
    assert length(batch__global_batch_size=12, optimizer__learning_rate_rule="adascale") == (10, 5, 2.0)


ADAPTIVE: dict[str, Any] = {
    "task__options": {"examples": 400, "action": "overhead"},
    "global_batch_size": "auto",
    "initial": 8,
    "largest": 32,
    "micro_batch_size": 16,
    "optimizer__learning_rate": 0.002,
    "optimizer__tuned_batch_size": 4,
}


def test_real_ranks_change_their_batch_together_and_a_resumed_run_keeps_it(rank_pool: RankPool, tmp_path: Path) -> None:
    for steps in (90, 150):
        settings = {**ADAPTIVE, "run__steps": steps, "checkpoint__keep": 99}
        ended = train_ranks(rank_pool, 2, regression(tmp_path, **settings), resume="auto")
        assert [one.kind for one in ended] == ["", ""], ended[0].message
    records = steps_of(tmp_path / "run")
    sizes = [record.global_batch_size for record in records]
    assert sizes[0] == 8 and max(sizes) > 8  # a forward's overhead is that of thousands of such examples
    assert all(other <= 2 * one for one, other in pairwise(sizes))
    assert sizes[90] == saved(tmp_path / "run", 90, 2)["shared"]["course"]["batch"]["size"]
    for record in records:
        assert record.examples == record.global_batch_size or record.epoch % 1 == 0
        reading = record.reading
        if reading is not None and reading.state == "resolved":
            factor = (1 + reading.noise_scale / 4) / (1 + reading.noise_scale / record.global_batch_size)
            assert record.learning_rate == pytest.approx(0.002 * factor)


def test_with_adam_it_goes_on_changing_once_the_noise_scale_is_adams(rank_pool: RankPool, tmp_path: Path) -> None:
    """Adam's metric is seen in sampled steps only: they must come soon after each change."""
    settings = {**ADAPTIVE, "optimizer__name": "adam", "run__steps": 200}
    settings |= {"largest": 256, "micro_batch_size": 128, "noise_scale__sample_every": "auto"}
    (ended, _) = train_ranks(rank_pool, 2, regression(tmp_path, **settings))
    assert ended.kind == "", ended.message
    records = steps_of(tmp_path / "run")
    assert [record.noise.headline for record in records if record.noise is not None][-1] == "preconditioned"
    sizes = [record.global_batch_size for record in records]
    changes = [step for step, (one, other) in enumerate(pairwise(sizes), start=1) if one != other]
    assert len([step for step in changes if step > 75]) >= 2, changes


def test_adascale_ends_when_its_gains_make_the_steps(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {**ADAPTIVE, "optimizer__learning_rate_rule": "adascale", "run__steps": 100}
    (ended, _) = train_ranks(rank_pool, 2, regression(tmp_path, **settings))
    assert ended.kind == ""
    records = steps_of(tmp_path / "run")
    gains = [record.learning_rate / 0.002 for record in records]
    assert all(1 - 1e-12 <= gain <= 8 for gain in gains)
    assert sum(gains) >= 100 > sum(gains[:-1]) and len(records) < 100
