"""Copies of shards and shards not drawn alike: the statistic on numbers, and both faults with real ranks on digits."""

from __future__ import annotations

import logging
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

import ddp
from ddp.job import DigitsSection
from ddp.noise.fixed_order import LAGS, Deviations, FixedOrder
from ddp.noise.shards import COPIES, ShardWatch
from ddp.tasks.digits import CLASSES, IMAGE, _load
from ddp.tasks.networks import convolutional_network
from ddp.transport.base import Reduction
from ddp.transport.comm_hook import add_up
from ddp.transport.projection import ELEMENTS, SmallParameters
from ddp.transport.row import DIRECTIONS, ROW_LENGTH, StepRow
from ranks import RankPool, process_group


def observe(watch: ShardWatch, norms: np.ndarray, projections: np.ndarray, examples: list[float] | None = None) -> str:
    """What was said in all steps, one a line."""
    said = [watch.observe(norm.tolist(), values, examples) for norm, values in zip(norms, projections, strict=True)]
    return "\n".join(sentence for sentence in said if sentence)


def rows(generator: np.random.Generator, steps: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared norms, (steps, ranks), and projections, (steps, ranks, DIRECTIONS), of unrelated gradients."""
    return generator.exponential(size=(steps, ranks)), generator.standard_normal((steps, ranks, DIRECTIONS))


def test_copies_are_named_with_their_ranks_once_after_so_many_steps() -> None:
    norms, projections = rows(np.random.default_rng(0), COPIES + 6, 5)
    for values in (norms, projections):
        values[:, 3] = values[:, 1] * (1 + 1e-7)
    watch = ShardWatch()
    assert observe(watch, norms[:COPIES], projections[:COPIES]) == ""  # of the first, nothing shows that it turned
    said = observe(watch, norms[COPIES:], projections[COPIES:])
    assert said.startswith("ranks 1, 3 see the same data") and f"in {COPIES} successive steps" in said
    assert "DistributedSampler" in said and "\n" not in said


@pytest.mark.parametrize("how", ["norms only", "one direction", "one step short", "zero", "not finite", "one rank"])
def test_what_is_no_copy(how: str) -> None:
    norms, projections = rows(np.random.default_rng(1), 4 * COPIES, 3)
    norms[:, 2] = norms[:, 0]
    if how != "norms only":
        projections[:, 2] = projections[:, 0]
    if how == "one direction":
        projections[:, 2, -1] += 1e-3
    if how == "one step short":
        norms[COPIES - 1 :: COPIES, 2] *= 1.0001
    if how == "zero":
        norms[:], projections[:] = 0.0, 0.0
    if how == "not finite":
        norms[COPIES - 1 :: COPIES, 1] = math.nan
    if how == "one rank":
        norms, projections = norms[:, :1], projections[:, :1]
    assert observe(ShardWatch(), norms, projections) == ""


@pytest.mark.parametrize("how", ["shrinks", "turns slowly", "turns"])
def test_equal_gradients_are_copies_only_if_they_turn_from_step_to_step(how: str) -> None:
    """By half a hundredth in each step or by two; by nothing where they only shrink, as a penalty's under plain SGD."""
    angle = {"shrinks": 0.0, "turns slowly": 0.005, "turns": 0.02}[how] * np.arange(80)
    directions = np.linalg.qr(np.random.default_rng(2).standard_normal((DIRECTIONS, 2)))[0]
    path = 0.9 ** np.arange(80)[:, None] * (
        np.outer(np.cos(angle), directions[:, 0]) + np.outer(np.sin(angle), directions[:, 1])
    )
    projections = np.repeat(path[:, None], 3, axis=1)
    said = observe(ShardWatch(), np.square(projections).sum(axis=2), projections)
    assert said.startswith("all ranks see the same data") if how == "turns" else said == ""


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_penalty_leaves_of_a_fitted_hinge_loss_is_no_copy(seed: int, momentum: float) -> None:
    """Separable data: no example is inside the margin in step after step, and both ranks have the penalty's gradient."""
    generator = np.random.default_rng(seed)
    truth, weights, velocity = generator.standard_normal(10), np.zeros(10), np.zeros(10)
    signs = generator.choice([-1.0, 1.0], (10, DIRECTIONS))
    watch, said, equal, longest = ShardWatch(), [], 0, 0
    for _ in range(1500):
        gradients = []
        for _ in range(2):
            inputs = generator.standard_normal((32, 10))
            inputs = inputs[np.abs(inputs @ truth) > 0.5 * np.linalg.norm(truth)][:8]
            labels = np.sign(inputs @ truth)
            inside = labels * (inputs @ weights) < 1
            gradients.append(2e-3 * weights - (inside * labels) @ inputs / len(inputs))
        own = np.array(gradients)
        equal = equal + 1 if np.array_equal(*own) else 0
        longest = max(longest, equal)
        said.append(watch.observe(np.square(own).sum(axis=1).tolist(), own @ signs))
        velocity = momentum * velocity + own.mean(axis=0)
        weights = weights - 0.05 * velocity
    assert longest > COPIES  # else it would prove nothing
    assert not any(said)


@pytest.mark.parametrize("shares", [(0.25, 0.25, 0.25, 0.25), (0.9, 0.1)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_few_distinct_examples_coincide_without_being_copies(ranks: int, shares: tuple[float, ...]) -> None:
    generator = np.random.default_rng(ranks)
    gradients = generator.standard_normal((len(shares), 6))
    own = gradients[generator.choice(len(shares), (3000, ranks), p=shares)]  # one example a rank
    assert (own[:, 0] == own[:, 1]).all(axis=1).mean() > 0.2
    projections = own @ generator.choice([-1.0, 1.0], (6, DIRECTIONS))
    assert observe(ShardWatch(), np.square(own).sum(axis=2), projections) == ""


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("steps", [130, 330])
def test_z_is_that_of_a_loop_over_the_definition(ranks: int, steps: int) -> None:
    norms, projections = rows(np.random.default_rng(ranks), steps, ranks)
    projections += 0.1 * np.arange(ranks)[:, None]
    watch = ShardWatch()
    said = observe(watch, norms, projections)
    products = []
    for step in range(1, steps):
        now, before = (
            np.concatenate([values - values.mean() for values in projections[at].T]) for at in (step, step - 1)
        )
        products.append(now @ before / (np.linalg.norm(now) * np.linalg.norm(before)))
    assert said == ""  # else z would have stood still
    assert watch.z == pytest.approx(np.sum(products[-200:]) / np.sqrt(np.sum(np.square(products[-200:]))), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "t2", "lognormal", "rare"])
def test_silent_where_ranks_draw_alike(ranks: int, kind: str) -> None:
    """The largest z of 3,000 steps is below the alarm by a wide margin; gradients shrink e^6 times and wander."""
    generator = np.random.default_rng(3)
    size, watch, largest = (3000, ranks, DIRECTIONS), ShardWatch(), 0.0
    draws = {
        "gaussian": lambda: generator.standard_normal(size),
        "t2": lambda: generator.standard_t(2, size),
        "lognormal": lambda: np.exp(2 * generator.standard_normal(size)),
        "rare": lambda: (generator.random(size[:2])[..., None] < 0.02) + 1e-3 * generator.standard_normal(size),
    }[kind]()
    time = np.linspace(0, 6, len(draws))[:, None, None]
    norms = generator.exponential(size=size[:2])
    for norm, projection in zip(norms, draws * np.exp(-time) + np.sin(2 * time), strict=True):
        assert watch.observe(norm.tolist(), projection) is None
        largest = max(largest, watch.z)
    assert 0 < largest < 5


def test_a_lasting_difference_is_named_once_also_where_steps_are_missing() -> None:
    norms, projections = rows(np.random.default_rng(4), 160, 2)
    projections += np.outer([1.0, -1.0], np.random.default_rng(5).standard_normal(DIRECTIONS))
    projections[::7, 0] = math.nan
    projections[3::7, 1, :2] = math.inf, -math.inf
    said = observe(ShardWatch(), norms, projections)
    assert "not drawn alike" in said and "z = " in said and "set_epoch" in said and "\n" not in said


def test_steps_with_other_numbers_of_examples_a_rank_are_left_out() -> None:
    """One example against 63: of skewed gradients the smaller shard's is the smaller one more often than not."""
    generator = np.random.default_rng(5)
    heavy = np.exp(2 * generator.standard_normal((2000, 1, DIRECTIONS)))
    projections = np.concatenate([heavy, np.full_like(heavy, math.exp(2))], axis=1)
    norms = generator.exponential(size=projections.shape[:2])
    assert observe(ShardWatch(), norms, projections, [1.0, 63.0]) == ""
    assert "not drawn alike" in observe(ShardWatch(), norms, projections)


def test_the_projection_is_that_of_the_smallest_parameters_in_any_bucket() -> None:
    parameters = [torch.randn(7000), torch.randn(40), torch.randn(3, 5), torch.randn(4000)]
    small = SmallParameters(parameters)
    taken = {2: 15, 1: 40, 3: 4000, 0: ELEMENTS - 4055}
    whole = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        inside = [parameters[index] for index in order]
        ends = np.cumsum([each.numel() for each in inside]).tolist()
        bucket = torch.cat([each.flatten() for each in inside])
        projection = small.in_bucket(inside, ends, bucket.device).of(bucket)
        assert projection is not None and projection.shape == (DIRECTIONS,)
        whole.append(projection.tolist())
    assert whole[0] == pytest.approx(whole[1], rel=1e-3, abs=1e-3)
    assert len({round(each, 3) for each in whole[0]}) == DIRECTIONS
    squares = sum(float(parameters[index].flatten()[:count].square().sum()) for index, count in taken.items())
    assert np.linalg.norm(whole[0]) < 6 * math.sqrt(squares)  # eight draws of that standard deviation
    ones = [torch.ones(5)]
    total = SmallParameters(ones).in_bucket(ones, [5], torch.device("cpu")).of(torch.full((5,), 2.0))
    assert total is not None and set(total.tolist()) <= {-10.0, -6.0, -2.0, 2.0, 6.0, 10.0}
    assert SmallParameters([]).in_bucket(ones, [5], torch.device("cpu")).of(torch.ones(5)) is None


def test_the_projections_of_buckets_add_up() -> None:
    first, second = torch.arange(float(DIRECTIONS)), torch.full((DIRECTIONS,), 0.5)
    first[0], second[0] = math.inf, -math.inf  # as where a scaled loss overflows: nothing may be raised
    buckets = [Reduction(first, 1.0, 1.0, projection=each) for each in (first, None, second)]
    total = add_up(buckets).projection
    assert math.isnan(total[0]) and list(total[1:]) == [index + 0.5 for index in range(1, DIRECTIONS)]
    assert add_up([]).projection == (0.0,) * DIRECTIONS


def test_a_row_keeps_its_projection_behind_its_numbers() -> None:
    row = StepRow(
        3.0,
        2.0,
        measure_seconds=0.5,
        metric_sum=1.5,
        projection=tuple(float(each) for each in range(1, DIRECTIONS + 1)),
    )
    packed = row.pack()
    assert packed.shape == (ROW_LENGTH,) and StepRow.unpack(packed) == row
    names = [field.name for field in fields(StepRow)]
    numbers = len(names) - 1
    assert packed[:2].tolist() == [3.0, 2.0] and packed[names.index("measure_seconds")] == 0.5
    assert packed[numbers : numbers + DIRECTIONS].tolist() == list(row.projection)
    assert not packed[numbers + DIRECTIONS :].any()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_z_of_a_lag_is_that_of_a_loop_over_the_definition(ranks: int, missing: bool) -> None:
    """Also past the longest lag, where the ring has gone round; a step without numbers counts for nothing."""
    steps, seen = LAGS + 150, []
    generator = np.random.default_rng(ranks)
    order = FixedOrder()
    for step in range(steps):
        values = generator.standard_normal((ranks, DIRECTIONS)) * math.exp(-step / 200)
        spread = values - values.mean(axis=0)
        length = float(np.linalg.norm(spread))
        if missing and step % 5 == 0:
            assert order.observe(None) is None
            continue
        order.observe(Deviations(values.mean(axis=0), spread / length, length))
        seen.append((spread / length).ravel())
    for lag in (1, 7, 500, LAGS):
        products = np.array([now @ before for now, before in zip(seen[lag:], seen, strict=False)])
        weights = 0.99 ** np.arange(len(products))[::-1]
        expected = (weights * products).sum() / np.sqrt(np.square(weights * products).sum()) if len(products) else 0.0
        assert order.z(lag) == pytest.approx(expected, rel=1e-4, abs=1e-5)  # kept in float32


@pytest.mark.parametrize("what", ["sorted", "one order", "swings"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_only_data_that_repeat_themselves_and_change_from_step_to_step_look_sorted(ranks: int, what: str) -> None:
    """A hundred steps an epoch. A gradient that swings changes as much, and one order that is not sorted repeats itself."""
    for seed in range(5):
        generator, watch = np.random.default_rng(seed), ShardWatch()
        epoch = generator.standard_normal((100, ranks, DIRECTIONS))
        if what == "sorted":
            epoch += 15 * np.repeat(generator.standard_normal((10, 1, DIRECTIONS)), 10, axis=0)
        swing = 20 * generator.standard_normal(DIRECTIONS) if what == "swings" else np.zeros(DIRECTIONS)
        said = []
        for step in range(500):
            own = epoch[step % 100] if what != "swings" else generator.standard_normal((ranks, DIRECTIONS))
            values = own + 0.5 * generator.standard_normal((ranks, DIRECTIONS)) + (-1) ** step * swing
            said.append(watch.observe(generator.exponential(size=ranks).tolist(), values * math.exp(-step / 100)))
        named = [(step, each) for step, each in enumerate(said) if each]
        if what != "sorted":
            assert named == []
            continue
        ((step, sentence),) = named
        assert 149 <= step <= 200  # 49 pairs at least
        assert "every 100 full steps" in sentence and "look sorted" in sentence and "set_epoch" in sentence


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _digits() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images, labels, and the examples' numbers sorted by class."""
    images, labels = _load()
    return (images - images.mean()) / images.std(), labels, np.argsort(labels.numpy(), kind="stable")


def _network(*, batch_norm: bool) -> nn.Module:
    return convolutional_network(DigitsSection(name="digits", channels=8, batch_norm=batch_norm), IMAGE, CLASSES)


def _shards(how: str, step: int, ranks: int, generator: np.random.Generator, by_class: np.ndarray) -> list[np.ndarray]:
    """Each rank's 16 examples of a step; of data sorted by class, from a part of its own or in turn."""
    if how == "in turn":
        start = step % (len(by_class) // (16 * ranks)) * 16 * ranks
        return [by_class[start + rank : start + 16 * ranks : ranks] for rank in range(ranks)]
    if how == "sorted":
        return [shard[generator.permutation(len(shard))[:16]] for shard in np.array_split(by_class, ranks)]
    shuffled = generator.permutation(len(by_class))
    return [shuffled[0 if how == "copies" and rank < 2 else rank :: ranks][:16] for rank in range(ranks)]


def _train(how: str, ranks: int, batch_norm: bool, steps: int, seed: int) -> list[str]:
    """What is said of ranks that are computed one after the other; SGD, or Adam on a network with BatchNorm."""
    images, labels, by_class = _digits()
    torch.manual_seed(seed)
    generator, watch, said = np.random.default_rng(seed), ShardWatch(), []
    model = _network(batch_norm=batch_norm)
    optimizer = Adam(model.parameters(), lr=3e-3) if batch_norm else SGD(model.parameters(), lr=0.05)
    parameters = list(model.parameters())
    lengths = [each.numel() for each in parameters]
    small = SmallParameters(parameters).in_bucket(parameters, np.cumsum(lengths).tolist(), torch.device("cpu"))
    for step in range(steps):
        own = []
        for shard in map(torch.from_numpy, _shards(how, step, ranks, generator, by_class)):
            gradients = torch.autograd.grad(cross_entropy(model(images[shard]), labels[shard]), parameters)
            own.append(torch.cat([each.flatten() for each in gradients]))
        projections = [each.tolist() for each in map(small.of, own) if each is not None]
        said.append(watch.observe([float(each.square().sum()) for each in own], projections))
        for parameter, gradient in zip(parameters, torch.stack(own).mean(dim=0).split(lengths), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.step()
    return [sentence for sentence in said if sentence]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_sorted_digits_are_told_from_shuffled_ones_whatever_the_seed(ranks: int, batch_norm: bool) -> None:
    for seed in range(4):
        assert _train("shuffled", ranks, batch_norm, 70, seed) == []
        (said,) = _train("sorted", ranks, batch_norm, 70, seed)
        assert "not drawn alike, sorted by class" in said


@pytest.mark.parametrize("batch_norm", [False, True])
def test_sorted_digits_dealt_out_in_turn_are_named_in_the_third_or_fourth_epoch(batch_norm: bool) -> None:
    for seed in range(2):
        (said,) = _train("in turn", 4, batch_norm, 120, seed)
        assert "look sorted, by class say, and dealt out to the ranks in turn" in said


def _attached(rank: int, world_size: int, store_address: str, how: str, steps: int) -> list[str]:
    """What an attached script hears that trains on digits, 16 examples a rank and step."""
    images, labels, by_class = _digits()
    generator = np.random.default_rng(0)  # ranks draw the same and keep their own
    handler = _Lines()
    logging.getLogger("ddp.metering").addHandler(handler)
    try:
        with process_group(rank, world_size, store_address):
            torch.manual_seed(0)
            model = DistributedDataParallel(_network(batch_norm=False))
            optimizer = SGD(model.parameters(), lr=0.05)
            meter = ddp.attach(model, batch_size=16, transport="shared_memory", layers=False)
            for step in range(steps):
                chosen = torch.from_numpy(_shards(how, step, world_size, generator, by_class)[rank])
                optimizer.zero_grad()
                cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                meter.step()
            meter.close()
    finally:
        logging.getLogger("ddp.metering").removeHandler(handler)
    return handler.lines


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_of_digits_over_processes(rank_pool: RankPool, ranks: int) -> None:
    steps = {"shuffled": 60, "sorted": 60, "copies": 30}
    said = {how: rank_pool.run(ranks, _attached, how, count) for how, count in steps.items()}
    assert all(lines == [] for heard in said.values() for lines in heard[1:])  # one rank speaks
    assert said["shuffled"][0] == []
    assert len(said["sorted"][0]) == 1 and "not drawn alike, sorted by class" in said["sorted"][0][0]
    who = "all ranks see" if ranks == 2 else "ranks 0, 1 see"
    assert len(said["copies"][0]) == 1 and said["copies"][0][0].startswith(who)
