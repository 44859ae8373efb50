"""How ranks share out a stream and agree on its end, on several ranks, against the list that it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ddp.errors import CheckpointError, UsageError
from ddp.job import QuadraticSection, parse_job
from ddp.tasks import load_task
from ddp.tasks.base import TensorExamples
from ddp.training.data import OPEN, BatchPlan
from ddp.training.finite import finite, sample_of_stream
from ddp.training.plan import plan_run
from ddp.training.stream import Stream, declared_examples, is_stream
from ranks import RankPool, process_group


class Numbers(IterableDataset[int]):
    """0 to `count` - 1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        yield from range(self.count)


class Sharded(Numbers):
    """Every rank has its own part; that of rank r is r examples longer."""

    num_shards = 12

    def shard(self, num_shards: int, index: int) -> Numbers:
        return Part(self.count // num_shards + index, index)


class Part(Numbers):
    def __init__(self, count: int, index: int) -> None:
        super().__init__(count)
        self.index = index

    def __iter__(self) -> Iterator[int]:
        yield from range(1000 * self.index, 1000 * self.index + self.count)


@dataclass(frozen=True)
class Taken:
    """A step of one rank."""

    micro_batches: list[list[int]]
    global_examples: int
    stop: int


def read(rank: int, world_size: int, store: str, dataset: Any, plan: BatchPlan, steps: int, resume_at: int) -> Any:
    """Steps; from `resume_at` on they are another stream's that took over the first one's state."""
    with process_group(rank, world_size, store):
        stream = Stream(dataset, rank, world_size, seed=3, shuffle_buffer=0)
        taken, position = list[Taken](), 0
        try:
            first = stream.first(plan).tolist()
            for number in range(steps):
                if number == resume_at:
                    state = stream.state_dict()
                    stream = Stream(dataset, rank, world_size, seed=3, shuffle_buffer=0)
                    stream.check_state(state)
                    stream.load_state_dict(state)
                step = stream.step(plan, position)
                position = step.stop if plan.examples - step.stop >= world_size else 0
                batches = [each.tolist() for each in step.micro_batches]
                assert step.examples == sum(map(len, batches)) and step.positions == ()
                taken.append(Taken(batches, step.global_examples, step.stop))
        except UsageError as error:
            return str(error)
        return taken, first


def plan(world_size: int, batch: int = 5, micro: int = 2, examples: int = OPEN) -> BatchPlan:
    return BatchPlan(examples, batch, micro, world_size, 3)


def run(pool: RankPool, world_size: int, dataset: Any, steps: int, resume_at: int = -1, **settings: int) -> list[Any]:
    return pool.run(world_size, read, dataset, plan(world_size, **settings), steps, resume_at)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_stream_that_all_ranks_read_is_dealt_out_in_turn(rank_pool: RankPool, world_size: int) -> None:
    """23 = 4 * 5 + 3: a rest of three is a step of its own, or joins the batch before where it is too small for all ranks."""
    found = run(rank_pool, world_size, Numbers(23), steps=10, resume_at=3)
    sizes = [5, 5, 5, 5, 3] if world_size <= 3 else [5, 5, 5, 8]
    position, index = 0, 0
    for step in range(10):
        size = sizes[index]
        shares = [[each for batch in ranks[0][step].micro_batches for each in batch] for ranks in found]
        assert shares == [list(range(position, position + size))[rank::world_size] for rank in range(world_size)]
        assert all(len(batch) <= 2 for ranks in found for batch in ranks[0][step].micro_batches)
        assert {ranks[0][step].global_examples for ranks in found} == {size}
        is_last = index == len(sizes) - 1
        assert {ranks[0][step].stop for ranks in found} == {OPEN if is_last else position + size}
        position, index = (0, 0) if is_last else (position + size, index + 1)
    assert all(ranks[1] == [0, 1] for ranks in found)  # looked at before the first step


@pytest.mark.parametrize("world_size, batch", [(2, 5), (3, 7), (4, 8)])
def test_ranks_with_parts_of_their_own_end_together(rank_pool: RankPool, world_size: int, batch: int) -> None:
    """Rank 0's part is the shortest: its end is everyone's, and the last batch is the largest of which all have their share."""
    found = run(rank_pool, world_size, Sharded(12 * world_size + 5), steps=9, resume_at=2, batch=batch)
    lengths = [(12 * world_size + 5) // world_size + rank for rank in range(world_size)]
    expected, places = list[list[list[int]]](), [0] * world_size
    while len(expected) < 9:
        most = min(
            (length - place) * world_size + rank
            for rank, (length, place) in enumerate(zip(lengths, places, strict=True))
        )
        size = min(batch, most)
        shares = [len(range(rank, size, world_size)) for rank in range(world_size)]
        expected.append([[1000 * rank + places[rank] + i for i in range(shares[rank])] for rank in range(world_size)])
        places = [place + share for place, share in zip(places, shares, strict=True)]
        if any(place >= length for place, length in zip(places, lengths, strict=True)):
            places = [0] * world_size
    for step in range(9):
        taken = [[each for part in ranks[0][step].micro_batches for each in part] for ranks in found]
        assert taken == expected[step]
        sizes = list(map(len, taken))
        assert max(sizes) - min(sizes) <= 1 and {ranks[0][step].global_examples for ranks in found} == {sum(sizes)}


def test_an_epoch_may_be_declared(rank_pool: RankPool) -> None:
    """Twelve examples an epoch of a stream of 23: 5 + 5 + 2, then it goes on; its end ends an epoch early."""
    found = run(rank_pool, 2, Numbers(23), steps=7, examples=12)
    for taken, _ in found:
        assert [step.global_examples for step in taken] == [5, 5, 2, 5, 6, 5, 5]
        assert [step.stop for step in taken] == [5, 10, 12, 5, 12, 5, 10]
    assert found[1][0][4].micro_batches == [[18], [20, 22]]


@pytest.mark.parametrize(
    "world_size, dataset, words",
    [
        (3, Numbers(2), "not even an example for each of the 3 ranks: start fewer"),
        (2, Numbers(0), "the training stream of rank 0 has no examples"),
    ],
)
def test_too_short_streams(rank_pool: RankPool, world_size: int, dataset: Any, words: str) -> None:
    for message in run(rank_pool, world_size, dataset, steps=2):
        assert words in message


class Different(Numbers):
    """Another length on each rank: not the same stream at all."""

    def __iter__(self) -> Iterator[int]:
        yield from range(self.count + 10 * torch.distributed.get_rank())


def test_ranks_that_read_different_streams_are_told(rank_pool: RankPool) -> None:
    for message in run(rank_pool, 2, Different(13), steps=4):
        assert (
            "the ranks read different training streams: in pass 0 one rank finds 3 examples where another finds 5"
            in (message)
        )


def test_a_stream_that_was_shared_out_goes_on_with_as_many_ranks() -> None:
    state = Stream(Sharded(24), 1, 2, seed=3, shuffle_buffer=0).state_dict()
    with pytest.raises(CheckpointError, match="by shard.. among 2 ranks, now it is by shard.. among 3"):
        Stream(Sharded(24), 1, 3, seed=3, shuffle_buffer=0).check_state(state)
    whole = Stream(Numbers(24), 1, 2, seed=3, shuffle_buffer=0).state_dict()
    Stream(Numbers(24), 2, 4, seed=3, shuffle_buffer=0).check_state(whole)


def test_parts_that_do_not_go_up_are_not_cut() -> None:
    """12 shards cannot be given to 5 ranks evenly: then all read everything, as HuggingFace does it."""
    assert not Stream(Sharded(24), 1, 5, seed=3, shuffle_buffer=0).is_sharded
    assert Stream(Sharded(24), 1, 4, seed=3, shuffle_buffer=0).is_sharded


class Declared(Numbers):
    examples_per_epoch = 7


class OfTheTask:
    examples_per_epoch = 9


class WithLength(Numbers):
    def __len__(self) -> int:
        return self.count


def test_how_long_an_epoch_is() -> None:
    assert declared_examples(None, Declared(3)) == 7
    assert declared_examples(OfTheTask(), Declared(3)) == 7
    assert declared_examples(OfTheTask(), Numbers(3)) == 9
    assert declared_examples(None, WithLength(4)) == 4
    assert declared_examples(None, Numbers(3)) == OPEN
    OfTheTask.examples_per_epoch, before = 0, OfTheTask.examples_per_epoch
    with pytest.raises(UsageError, match="examples_per_epoch is 0, not a number of examples"):
        declared_examples(OfTheTask(), Numbers(3))
    OfTheTask.examples_per_epoch = before


def test_what_a_stream_is() -> None:
    assert is_stream(Numbers(3)) and is_stream(iter([1]))
    assert not is_stream(TensorExamples(torch.zeros(3))) and not is_stream([1, 2])


class OnceOnly:
    """Its training set is a generator; else the task `quadratic`'s."""

    def __init__(self) -> None:
        self.task: Any = load_task(QuadraticSection(name="quadratic"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def datasets(self) -> tuple[Any, Any]:
        training, validation = self.task.datasets()
        return (training[index] for index in range(100)), validation


def test_a_generator_which_can_be_read_once_is_no_training_set() -> None:
    table = {
        "run": {"steps": 3},
        "task": {"name": "test_stream:OnceOnly"},
        "batch": {"global_batch_size": 8},
        "evaluation": {"metric": "loss"},
    }
    with pytest.raises(UsageError, match="the training set is a generator, which can be read only once"):
        plan_run(parse_job(table), 1, 0, allow_import=["test_stream"])


class Pairs(Numbers):
    @staticmethod
    def collate(examples: list[int]) -> Tensor:
        return -torch.tensor(examples)


def test_iterable_sets_are_kept_for_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorExamples(torch.zeros(3))
    assert finite(data) is data
    kept: Any = finite(Pairs(5))
    assert len(kept) == 5 and kept.collate([kept[1], kept[4]]).tolist() == [-1, -4]
    assert len(sample_of_stream(Pairs(5), 3)) == 3  # type: ignore[arg-type]
    monkeypatch.setattr("ddp.training.finite.MOST_VALIDATION_EXAMPLES", 4)
    with pytest.raises(UsageError, match="has not ended after 4 examples"):
        finite(Pairs(5))
    with pytest.raises(UsageError, match="has no examples"):
        sample_of_stream(Pairs(0), 3)
