"""Copies of shards and shards not drawn alike: the statistic on numbers, and both faults with real ranks on digits."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import ddp
from ddp.noise.shards import DIRECTIONS, ShardWatch
from ddp.tasks.digits import _load, build_network
from ddp.transport.projection import ELEMENTS, SmallParameters
from ranks import RankPool, process_group


def observe(watch: ShardWatch, norms: np.ndarray, projections: np.ndarray, examples: list[float] | None = None) -> str:
    """What was said in all steps, one a line."""
    said = [
        watch.observe(norm.tolist(), projection.tolist(), examples)
        for norm, projection in zip(norms, projections, strict=True)
    ]
    return "\n".join(sentence for sentence in said if sentence)


def test_copies_are_named_with_their_ranks_once_after_five_steps() -> None:
    generator = np.random.default_rng(0)
    norms, projections = generator.exponential(size=(12, 5)), generator.standard_normal((12, 5))
    for values in (norms, projections):
        values[:, 3] = values[:, 1] * (1 + 1e-7)
    watch = ShardWatch()
    assert observe(watch, norms[:4], projections[:4]) == ""
    said = observe(watch, norms[4:], projections[4:])
    assert said.startswith("ranks 1, 3 see the same data") and "DistributedSampler" in said and "\n" not in said


@pytest.mark.parametrize("how", ["norms only", "four in a row", "zero", "not finite", "one rank"])
def test_what_is_no_copy(how: str) -> None:
    generator = np.random.default_rng(1)
    norms, projections = generator.exponential(size=(20, 3)), generator.standard_normal((20, 3))
    norms[:, 2] = norms[:, 0]
    if how != "norms only":
        projections[:, 2] = projections[:, 0]
    if how == "four in a row":
        norms[4::5, 2] *= 1.0001
    if how == "zero":
        norms[:], projections[:] = 0.0, 0.0
    if how == "not finite":
        norms[4::5, 1] = math.nan
    if how == "one rank":
        norms, projections = norms[:, :1], projections[:, :1]
    assert observe(ShardWatch(), norms, projections) == ""


def test_all_ranks_equal() -> None:
    numbers = np.repeat(np.random.default_rng(2).exponential(size=(6, 1)), 3, axis=1)
    assert observe(ShardWatch(), numbers, numbers).startswith("all ranks see the same data")


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_z_is_that_of_a_loop_over_the_definition(ranks: int) -> None:
    steps = 130
    projections = np.random.default_rng(ranks).standard_normal((steps, ranks)) + 0.2 * np.arange(ranks)
    watch = ShardWatch()
    observe(watch, np.random.default_rng(0).exponential(size=(steps, ranks)), projections)
    products = []
    for step in range(DIRECTIONS, steps):
        now, before = (row - row.mean() for row in (projections[step], projections[step - DIRECTIONS]))
        products.append(now @ before / (np.linalg.norm(now) * np.linalg.norm(before)))
    assert watch.z == pytest.approx(np.sum(products) / np.sqrt(np.sum(np.square(products))), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "t2", "lognormal"])
def test_silent_where_ranks_draw_alike(ranks: int, kind: str) -> None:
    """The largest z of 3,000 steps is below the alarm by a wide margin; gradients shrink e^6 times and wander."""
    generator = np.random.default_rng(3)
    size, watch, largest = (3000, ranks), ShardWatch(), 0.0
    draws = {
        "gaussian": generator.standard_normal(size),
        "t2": generator.standard_t(2, size),
        "lognormal": np.exp(2 * generator.standard_normal(size)),
    }[kind]
    time = np.linspace(0, 6, len(draws))[:, None]
    norms = generator.exponential(size=size)
    for norm, projection in zip(norms, draws * np.exp(-time) + np.sin(2 * time), strict=True):
        assert watch.observe(norm.tolist(), projection.tolist()) is None
        largest = max(largest, watch.z)
    assert 0 < largest < 5


def test_a_lasting_difference_is_named_once_and_steps_without_numbers_do_not_shift_the_directions() -> None:
    generator = np.random.default_rng(4)
    sign = np.array([1.0, 1.0, -1.0, -1.0])  # the difference looks the other way in half of the directions
    projections = generator.standard_normal((160, 2)) + 1.5 * np.outer(np.resize(sign, 160), [1.0, -1.0])
    projections[::7] = math.nan
    said = observe(ShardWatch(), generator.exponential(size=(160, 2)), projections)
    assert "not drawn alike" in said and "z = " in said and "set_epoch" in said and "\n" not in said


def test_steps_with_other_numbers_of_examples_a_rank_are_left_out() -> None:
    """One example against 63: of skewed gradients the smaller shard's is the smaller one more often than not."""
    generator = np.random.default_rng(5)
    heavy = np.exp(2 * generator.standard_normal((2000, 1)))
    projections = np.hstack([heavy, np.full_like(heavy, math.exp(2))])
    norms = generator.exponential(size=projections.shape)
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
        projection = small.in_bucket(inside, ends, bucket.device)
        whole.append([float(projection.of(bucket, direction)) for direction in range(DIRECTIONS)])
        assert float(projection.of(bucket, DIRECTIONS)) == whole[-1][0]
    assert whole[0] == pytest.approx(whole[1], rel=1e-4)
    assert len({round(each, 3) for each in whole[0]}) == DIRECTIONS
    squares = sum(float(parameters[index].flatten()[:count].square().sum()) for index, count in taken.items())
    assert np.linalg.norm(whole[0]) < 6 * math.sqrt(squares)  # four draws of that standard deviation
    ones = [torch.ones(5)]
    total = SmallParameters(ones).in_bucket(ones, [5], torch.device("cpu")).of(torch.full((5,), 2.0), 0)
    assert float(total) in {-10.0, -6.0, -2.0, 2.0, 6.0, 10.0}
    assert SmallParameters([]).in_bucket(ones, [5], torch.device("cpu")).of(torch.ones(5), 0) == 0.0


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _digits(rank: int, world_size: int, store_address: str, how: str, steps: int) -> list[str]:
    """What an attached script hears that trains on digits, 16 examples a rank and step."""
    images, labels = _load()
    images = (images - images.mean()) / images.std()
    generator = np.random.default_rng(0)
    by_class = np.argsort(labels.numpy(), kind="stable")
    handler = _Lines()
    logging.getLogger("ddp.metering").addHandler(handler)
    try:
        with process_group(rank, world_size, store_address):
            torch.manual_seed(0)
            model = DistributedDataParallel(build_network(8, batch_norm=False, dropout=0.0))
            optimizer = SGD(model.parameters(), lr=0.05)
            meter = ddp.attach(model, batch_size=16, transport="shared_memory", layers=False)
            for _ in range(steps):
                order = by_class if how == "sorted" else generator.permutation(len(images))
                shards = np.array_split(order, world_size)
                shard = shards[0 if how == "copies" and rank < 2 else rank]
                taken = generator.permutation(len(shard))[:16] if how == "sorted" else np.arange(16)
                chosen = torch.from_numpy(shard[taken])
                optimizer.zero_grad()
                cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                meter.step()
            meter.close()
    finally:
        logging.getLogger("ddp.metering").removeHandler(handler)
    return handler.lines


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_of_digits(rank_pool: RankPool, ranks: int) -> None:
    steps = {"shuffled": 150, "sorted": 150, "copies": 8}
    said = {how: rank_pool.run(ranks, _digits, how, count) for how, count in steps.items()}
    assert all(lines == [] for heard in said.values() for lines in heard[1:])  # one rank speaks
    assert said["shuffled"][0] == []
    assert len(said["sorted"][0]) == 1 and "not drawn alike, sorted by class" in said["sorted"][0][0]
    who = "all ranks see" if ranks == 2 else "ranks 0, 1 see"
    assert len(said["copies"][0]) == 1 and said["copies"][0][0].startswith(who)
