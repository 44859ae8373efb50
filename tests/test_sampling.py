"""Which examples an epoch takes when classes or losses have a say, against probabilities written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ddp.errors import CheckpointError, JobFileError, UsageError
from ddp.job import SamplingSection, parse_job
from ddp.noise.advice import advise
from ddp.tasks.base import TensorExamples
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.progress import render_line
from ddp.telemetry.summary import History, summary
from ddp.training.data import BatchPlan, StepData, batches, fetch_step
from ddp.training.labels import labels_of
from ddp.training.sampling import ClassBalanced, LossWeighted, Sampler, Uniform, build_sampler, mixed
from telemetry_records import reading, run_info, step_records, with_reading

LABELS = np.array([7] * 40 + [2] * 10 + [-1] * 5 + [7] * 6, np.int64)  # 61 examples: 46, 10 and 5 of three classes
EXAMPLES = len(LABELS)


def plan(batch: int = 12, micro: int = 5, ranks: int = 1, examples: int = EXAMPLES, seed: int = 3) -> BatchPlan:
    return BatchPlan(examples, batch, micro, ranks, seed)


def chi_square(found: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    return float(((found - expected) ** 2 / expected).sum())


def test_every_class_is_drawn_as_often_and_every_example_of_one() -> None:
    sampler, epochs = ClassBalanced(LABELS), 300
    drawn = np.concatenate([sampler.order(plan(), epoch) for epoch in range(epochs)])
    assert len(drawn) == epochs * EXAMPLES
    expected = np.array([1 / (3 * {7: 46, 2: 10, -1: 5}[label]) for label in LABELS.tolist()])
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)
    classes = np.array([(LABELS[drawn] == label).sum() for label in (7, 2, -1)])
    assert chi_square(classes, np.full(3, len(drawn) / 3)) < 9.2  # 99 % of two degrees of freedom
    assert chi_square(np.bincount(drawn, minlength=EXAMPLES), expected * len(drawn)) < 88.4  # 99 % of sixty


@pytest.mark.parametrize("ranks, batch", [(1, 12), (2, 7), (3, 10), (4, 61)])
def test_shares_are_exact_whatever_the_layout(ranks: int, batch: int) -> None:
    """All ranks together take an epoch's draws in their order; a step is dealt out in floor and ceiling."""
    dataset, whole = TensorExamples(torch.arange(EXAMPLES)), ClassBalanced(LABELS).order(plan(), 4).tolist()
    samplers: list[Sampler] = [ClassBalanced(LABELS) for _ in range(ranks)]
    layout, taken = plan(batch, 4, ranks), list[int]()
    for position in layout.positions():
        steps = [
            fetch_step(lambda rows: dataset.__getitems__(rows)[0], each.order(layout, 4), layout, rank, position)
            for rank, each in enumerate(samplers)
        ]
        sizes = [step.examples for step in steps]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == steps[0].global_examples
        assert [len(micro) for step in steps for micro in step.micro_batches] == [
            len(part) for step in steps for part in step.positions
        ]
        taken += torch.cat([micro for step in steps for micro in step.micro_batches]).tolist()
    assert taken == whole[: len(taken)] and len(whole) - len(taken) < ranks


def test_an_epochs_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    sampler = ClassBalanced(LABELS)
    first, second = sampler.order(plan(), 0).tolist(), sampler.order(plan(), 1).tolist()
    assert first != second
    assert ClassBalanced(LABELS).order(plan(batch=3, ranks=2), 0).tolist() == first
    assert ClassBalanced(LABELS).order(plan(seed=4), 0).tolist() != first
    assert Uniform().order(plan(), 2).tolist() == plan().order(2).tolist()


def step_data(positions: Sequence[range]) -> StepData:
    return StepData((), sum(map(len, positions)), sum(map(len, positions)), positions[-1].stop, tuple(positions))


def loss_weighted(examples: int = EXAMPLES, **settings: float) -> LossWeighted:
    return LossWeighted(examples, 3, SamplingSection(name="loss_weighted", **settings))  # type: ignore[arg-type]


def see(sampler: LossWeighted, epoch: int, losses: NDArray[np.float64], until: int = EXAMPLES) -> None:
    """An epoch in which example i has the loss losses[i]."""
    order = sampler.order(plan(examples=len(losses)), epoch)
    for start in range(0, until, 7):
        part = range(start, min(start + 7, until))
        sampler.observe(torch.from_numpy(losses[order[part.start : part.stop]]), step_data([part]), 0)


def test_weights_are_the_latest_losses_over_a_uniform_floor() -> None:
    losses = np.arange(EXAMPLES, dtype=float) ** 2
    sampler = loss_weighted(uniform_share=0.25)
    first = sampler.order(plan(), 0)
    np.testing.assert_allclose(sampler.probabilities, np.full(EXAMPLES, 1 / EXAMPLES))
    see(sampler, 0, losses)
    drawn = np.concatenate([sampler.order(plan(), 1)])
    known = np.isin(np.arange(EXAMPLES), first)
    weights = np.where(known, losses, losses[known].mean())
    expected = 0.25 / EXAMPLES + 0.75 * weights / weights.sum()
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)
    assert expected.sum() == pytest.approx(1.0) and len(drawn) == EXAMPLES
    see(sampler, 1, 2 * losses)  # other losses for those drawn again; the others' stay
    sampler.order(plan(), 2)
    again = np.isin(np.arange(EXAMPLES), drawn)
    latest = np.where(again, 2 * losses, losses)
    known |= again
    weights = np.where(known, latest, latest[known].mean())
    np.testing.assert_allclose(sampler.probabilities, 0.25 / EXAMPLES + 0.75 * weights / weights.sum(), rtol=1e-12)


def test_an_example_drawn_twice_counts_with_its_last_loss() -> None:
    sampler = loss_weighted(examples=5)
    order = sampler.order(plan(batch=5, examples=5), 0)
    twice = next(index for index in range(5) if np.count_nonzero(order == index) > 1)
    positions = np.flatnonzero(order == twice)
    values = np.arange(5, dtype=float) + 1
    sampler.observe(torch.from_numpy(values[3:]), step_data([range(3, 5)]), 0)  # in whatever order they come
    sampler.observe(torch.from_numpy(values[:3]), step_data([range(3)]), 0)
    sampler.order(plan(batch=5, examples=5), 1)
    assert sampler.state_dict()["latest"][twice] == values[positions[-1]]


@pytest.mark.parametrize(
    "losses, weights",
    [
        ([math.nan] * 4, [1, 1, 1, 1]),
        ([0.0, 0.0, 0.0, math.nan], [1, 1, 1, 1]),
        ([-2.0, 0.0, 2.0, math.nan], [0, 2, 4, 2]),
        ([1e308, 1e308, 0.0, 0.0], [1, 1, 0, 0]),
        ([1.0, math.nan, 3.0, 2.0], [1, 2, 3, 2]),
    ],
)
def test_odd_losses(losses: list[float], weights: list[float]) -> None:
    expected = 0.2 / 4 + 0.8 * np.array(weights) / sum(weights)
    np.testing.assert_allclose(mixed(np.array(losses), 0.2), expected, rtol=1e-12)


def test_corrected_losses_are_unbiased_for_the_training_set() -> None:
    """Enumerated: the expectation over draws of w_i l_i is the plain mean of l, and no weight is above 1/u."""
    losses = np.linspace(0.1, 9, EXAMPLES)
    sampler = loss_weighted(uniform_share=0.3, correct_bias=True)
    see(sampler, 0, losses)
    order = sampler.order(plan(), 1)
    weighed = sampler.weigh(torch.ones(EXAMPLES, dtype=torch.float64), step_data([range(EXAMPLES)]), 0).numpy()
    np.testing.assert_allclose(weighed, 1 / (EXAMPLES * sampler.probabilities[order]), rtol=1e-12)
    weights = 1 / (EXAMPLES * sampler.probabilities)
    assert (sampler.probabilities * weights * losses).sum() == pytest.approx(losses.mean())
    assert weights.max() <= 1 / 0.3
    plain = loss_weighted()
    plain.order(plan(), 0)
    ones = torch.ones(4)
    assert plain.weigh(ones, step_data([range(4)]), 0) is ones


def test_losses_that_are_not_finite_tell_nothing_and_gradients_pass() -> None:
    sampler = loss_weighted(examples=6, correct_bias=True)
    layout = plan(batch=3, examples=6)
    sampler.order(layout, 0)
    losses = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    sampler.observe(losses, step_data([range(3)]), 0)
    sampler.weigh(losses, step_data([range(3)]), 0).sum().backward()
    assert losses.grad is not None and losses.grad.tolist() == [1.0, 1.0, 1.0]
    assert torch.isfinite(sampler.state_dict()["here"]).tolist() == [True] + [False] * 5


def test_a_state_goes_on_in_the_middle_of_an_epoch() -> None:
    losses = np.random.default_rng(5).exponential(size=EXAMPLES)
    one, other = loss_weighted(), loss_weighted()
    see(one, 0, losses)
    see(one, 1, losses, until=28)
    other.load_state_dict(one.state_dict())
    for sampler in (one, other):
        order = sampler.order(plan(), 1)
        sampler.observe(torch.from_numpy(losses[order[28:40]] * 3), step_data([range(28, 40)]), 0)
    assert one.order(plan(), 2).tolist() == other.order(plan(), 2).tolist()
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_with_another_seed_the_losses_of_the_epoch_before_stay_with_their_examples() -> None:
    losses = np.random.default_rng(5).exponential(size=EXAMPLES)
    one, other = loss_weighted(), LossWeighted(EXAMPLES, 4, SamplingSection(name="loss_weighted"))
    see(one, 0, losses)
    other.load_state_dict(one.state_dict())
    assert one.order(plan(), 1).tolist() != other.order(plan(), 1).tolist()
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_states_of_another_run_are_refused() -> None:
    state = loss_weighted().state_dict()
    for wrong, words in ((loss_weighted(9), "61 examples, here are 9"), (loss_weighted(uniform_share=0.5), "0.5")):
        with pytest.raises(CheckpointError, match=words):
            wrong.check_state(state)


class Columned(Dataset[dict[str, int]]):
    column_names = ("text", "label")

    def __getitem__(self, index: object) -> object:
        return [0, 1, 1] if index == "label" else None


class Labelled:
    def labels(self, dataset: object) -> list[int]:
        return [4, 4, 5]


def test_labels_are_found_where_users_keep_them() -> None:
    tensors = TensorExamples(torch.zeros(3, 2), torch.tensor([3, 1, 1]))
    with_attribute = TensorExamples(torch.zeros(3, 2))
    with_attribute.targets = [1, 2, 2]  # type: ignore[attr-defined]
    for task, dataset, expected in (
        (None, tensors, [3, 1, 1]),
        (None, with_attribute, [1, 2, 2]),
        (None, Columned(), [0, 1, 1]),
        (None, Subset(tensors, [2, 0, 1]), [1, 3, 1]),
        (Labelled(), tensors, [4, 4, 5]),
        (None, TensorExamples(torch.zeros(3), torch.tensor([True, False, True])), [1, 0, 1]),
    ):
        assert labels_of(task, dataset, 3).tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dataset, words",
    [
        (TensorExamples(torch.zeros(3, 2), torch.zeros(3)), r"labels are float32 of the shape \(3,\)"),
        (TensorExamples(torch.zeros(3, 2, dtype=torch.int64)), r"of the shape \(3, 2\)"),
        (TensorExamples(torch.ones(3, dtype=torch.int64)), "all examples have the label 1"),
        (Subset([1, 2, 3], [0, 1, 2]), "needs labels and finds none"),  # type: ignore[arg-type]
    ],
)
def test_labels_that_cannot_be(dataset: Dataset[Tensor], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        labels_of(None, dataset, 3)  # type: ignore[arg-type]


def test_the_table_of_the_job_file() -> None:
    table = {"run": {"epochs": 1}, "task": {"name": "digits"}, "batch": {"global_batch_size": 8}}
    for sampling, words in (
        ({"name": "class_balance"}, "sampling.name"),
        ({"name": "class_balanced", "correct_bias": True}, "correct_bias is not a setting of class_balanced"),
        ({"name": "loss_weighted", "uniform_share": 0}, "sampling.uniform_share"),
        ({"name": "loss_weighted", "uniform_shares": 0.1}, "uniform_share"),
    ):
        with pytest.raises(JobFileError, match=words):
            parse_job({**table, "sampling": sampling})
    job = parse_job({**table, "sampling": {"name": "loss_weighted", "correct_bias": True}})
    assert build_sampler(job.sampling, plan(), None).name == "loss_weighted, corrected"
    assert not build_sampler(parse_job(table).sampling, plan(), None).replaces


def test_readers_are_told_whose_noise_scale_it_is() -> None:
    info = replace(run_info(), sampling="class_balanced")
    (record,) = step_records(info, last_step=1)
    measured = with_reading(record, reading("resolved", 50.0, 40.0, 60.0))
    assert "noise scale (class_balanced) 50 [40, 60]" in render_line(info, measured, None, math.nan, math.nan)
    said = advise(reading("resolved", 50.0, 40.0, 60.0), 64, sampled=info.sampled)
    assert "the noise scale of the class-balanced distribution is 50" in said
    history = History(info)
    history.step(measured)
    assert "of the class-balanced distribution" in summary(info, history)
    (run,) = (each for each in Metrics(CollectorRegistry(), info).collect() if each.name == "ddp_run")
    assert run.samples[0].labels["sampling"] == "class_balanced"
    assert run_info().sampled == ""


def test_the_first_batches_of_a_plan_are_uniform() -> None:
    """What settles the buckets needs no sampler."""
    dataset = TensorExamples(torch.arange(EXAMPLES))
    (first,) = next(batches(dataset, plan(), 0, 0)).micro_batches[0]
    assert first.tolist() == plan().order(0)[: len(first)].tolist()
