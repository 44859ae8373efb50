"""The dealing-out of examples, against plain enumeration over many sizes, and its fetching."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.tasks.base import TensorExamples
from ddp.training.data import BatchPlan, batches, split, to_device

SIZES = [
    (examples, batch, micro, ranks)
    for examples, batch, micro, ranks in itertools.product(
        (1, 2, 3, 5, 7, 23, 64, 97, 100, 128, 131), (1, 2, 3, 7, 10, 13, 32, 64), (1, 2, 3, 5, 16, 64), (1, 2, 3, 4)
    )
    if ranks <= batch and ranks <= examples
]


def plan_of(examples: int, batch: int, micro: int, ranks: int, seed: int = 0) -> BatchPlan:
    return BatchPlan(examples, batch, micro, ranks, seed)


def starts(plan: BatchPlan) -> list[int]:
    return list(plan.positions())


def expected_batch_sizes(examples: int, batch: int, ranks: int) -> list[int]:
    """Take full batches while they last; what is left is a batch of its own, or too little for that."""
    sizes: list[int] = []
    while examples >= batch:
        sizes.append(batch)
        examples -= batch
    if examples >= ranks:
        sizes.append(examples)
    elif examples:
        sizes[-1] += examples
    return sizes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_example_goes_once_to_one_micro_batch(ranks: int) -> None:
    for sizes in (sizes for sizes in SIZES if sizes[3] == ranks):
        plan = plan_of(*sizes)
        dealt: list[int] = []
        assert len(starts(plan)) == plan.steps_per_epoch, sizes
        for step in plan.positions():
            shares = [[i for part in plan.micro_batches(step, rank) for i in part] for rank in range(ranks)]
            assert [list(plan.share(step, rank)) for rank in range(ranks)] == shares, sizes
            assert list(itertools.chain(*shares)) == list(plan.batch(step)), sizes
            dealt += itertools.chain(*shares)
        assert dealt == list(range(sizes[0])), sizes


def test_batches_shares_and_micro_batches_have_the_sizes_they_should() -> None:
    for sizes in SIZES:
        examples, batch, micro, ranks = sizes
        plan = plan_of(*sizes)
        lengths = [len(plan.batch(step)) for step in plan.positions()]
        assert lengths == expected_batch_sizes(examples, batch, ranks), sizes
        for step, length in zip(plan.positions(), lengths, strict=True):
            shares = [len(plan.share(step, rank)) for rank in range(ranks)]
            assert set(shares) <= {length // ranks, -(-length // ranks)}, sizes
            for rank, share in enumerate(shares):
                parts = [len(part) for part in plan.micro_batches(step, rank)]
                assert 1 <= min(parts) <= max(parts) <= micro, sizes
                assert max(parts) - min(parts) <= 1, sizes
                fewest = next(n for n in itertools.count(1) if ranks * n * micro >= length)
                assert len(parts) == min(fewest, share), sizes
                if length == batch:  # not the uneven last one
                    assert len(parts) == min(plan.gradient_accumulation_steps, share), sizes


def test_a_rest_smaller_than_the_ranks_joins_the_batch_before() -> None:
    assert [len(plan_of(130, 64, 32, 2).batch(start)) for start in (0, 64, 128)] == [64, 64, 2]
    assert [len(plan_of(130, 64, 16, 4).batch(start)) for start in (0, 64)] == [64, 66]
    assert [[len(p) for p in plan_of(130, 64, 16, 4).micro_batches(64, rank)] for rank in range(4)] == [
        [8, 8],
        [8, 9],
        [8, 8],
        [8, 9],
    ]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    reference = plan_of(101, 10, 5, 1, seed=3)
    for ranks, batch, micro in ((2, 10, 5), (3, 7, 1), (4, 64, 16)):
        assert (plan_of(101, batch, micro, ranks, seed=3).order(4) == reference.order(4)).all()
    orders = {tuple(plan_of(101, 10, 5, 1, seed).order(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(101)) for order in orders)


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(16, 16, 1), (16, 8, 2), (16, 4, 4), (16, 3, 2), (16, 5, 3)])
def test_a_step_sees_the_same_examples_whatever_the_layout(batch: int, micro: int, ranks: int) -> None:
    dataset = TensorExamples(torch.arange(100, 151))  # 51: a last batch of 3
    plan = plan_of(51, batch, micro, ranks, seed=7)
    order = [100 + index for index in plan_of(51, 16, 16, 1, seed=7).order(2)]
    expected = [order[start : start + 16] for start in range(0, 51, 16)]
    if ranks > 3:  # the rest of 3 joins
        expected[-2:] = [expected[-2] + expected[-1]]
    seen: list[list[int]] = [[] for _ in expected]
    for rank in range(ranks):
        for step, data in enumerate(batches(dataset, plan, rank, epoch=2)):
            values = torch.cat([micro_batch[0] for micro_batch in data.micro_batches]).tolist()
            assert data.examples == len(values)
            assert data.global_examples == len(expected[step])
            seen[step] += values
    assert seen == expected


class Recording(Dataset[Tensor]):
    """Plain examples, by `[i]` alone; remembers what was read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.tensor([float(index), -float(index)])


def test_an_epoch_entered_in_the_middle_reads_nothing_that_was_passed() -> None:
    plan = plan_of(29, 6, 2, 2, seed=1)
    whole = list(batches(Recording(29), plan, rank=1, epoch=3))
    dataset = Recording(29)
    rest = list(batches(dataset, plan, rank=1, epoch=3, start=12))
    assert len(whole) == 5
    assert len(rest) == 3
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
    assert dataset.read == [int(i) for start in (12, 18, 24) for i in plan.order(3)[list(plan.share(start, 1))]]
    assert not list(batches(dataset, plan, rank=1, epoch=3, start=29))


def test_reading_is_lazy_and_leaves_the_global_generator_alone() -> None:
    dataset = Recording(12)
    state = torch.get_rng_state()
    iterator = batches(dataset, plan_of(12, 4, 2, 2), rank=0, epoch=0)
    next(iterator)
    assert len(dataset.read) == 2
    list(iterator)
    assert torch.equal(torch.get_rng_state(), state)


class Dictionaries(Recording):
    """Examples by the many, and a collate of its own."""

    def __getitems__(self, indices: Sequence[int]) -> list[int]:
        assert type(indices) is list
        assert all(type(index) is int for index in indices)
        return [10 * index for index in indices]

    @staticmethod
    def collate(examples: list[int]) -> dict[str, Tensor]:
        return {"value": torch.tensor(examples)}


def test_the_data_sets_own_getitems_and_collate_are_used() -> None:
    dataset = Dictionaries(9)
    plan = plan_of(9, 9, 9, 1)
    (data,) = batches(dataset, plan, rank=0, epoch=0)
    assert data.micro_batches[0]["value"].tolist() == [10 * i for i in plan.order(0)]
    assert dataset.read == []


def test_more_ranks_than_examples_or_than_the_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="3 examples, fewer than the 4 ranks"):
        plan_of(3, 8, 2, 4)
    with pytest.raises(UsageError, match=r"batch.global_batch_size: 3 .* 4 ranks"):
        plan_of(100, 3, 2, 4)


def test_a_position_where_no_step_can_begin_is_an_error() -> None:
    plan = plan_of(10, 4, 4, 2)
    for position in (-1, 9, 10):
        with pytest.raises(IndexError, match=f"position {position} in an epoch of 10 examples for 2 ranks"):
            plan.batch(position)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_with_sizes_that_change_at_any_step_an_epoch_holds_each_example_once(ranks: int) -> None:
    random = np.random.default_rng(ranks)
    for examples in (4, 5, 23, 64, 131):
        for _ in range(50):
            position, seen = 0, []
            while position < examples:
                size = int(random.integers(ranks, 2 * examples))
                plan = plan_of(examples, size, int(random.integers(1, 20)), ranks)
                batch = plan.batch(position)
                shares = [part for rank in range(ranks) for part in plan.micro_batches(position, rank)]
                assert [i for part in shares for i in part] == list(batch)
                assert len(batch) == size or batch.stop == examples
                assert ranks <= len(batch) < size + ranks
                seen += batch
                position = batch.stop
            assert seen == list(range(examples))


def test_split_keeps_order_and_evenness() -> None:
    assert split(range(10, 17), 3) == [range(10, 12), range(12, 14), range(14, 17)]
    assert split(range(2), 4) == [range(0), range(1), range(1, 1), range(1, 2)]


def test_to_device_walks_through_containers() -> None:
    pair = namedtuple("pair", "a b")
    batch = {"x": (torch.ones(2), [torch.zeros(1), "name"]), "y": pair(torch.ones(1), 3)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].device.type == moved["x"][1][0].device.type == moved["y"].a.device.type == "meta"
    assert moved["x"][1][1] == "name"
    assert type(moved["y"]) is pair
    assert moved["y"].b == 3
    assert type(moved["x"]) is tuple
    assert type(moved["x"][1]) is list
