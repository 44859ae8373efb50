"""A stream's examples in their order, pass after pass, and a place to come back to; against the whole list."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from ddp.errors import CheckpointError
from ddp.training.stream_source import Source


class Numbers(IterableDataset[int]):
    """0 to `count` - 1; a thousand more in each pass where it is told the pass. Draws as it is read."""

    def __init__(self, count: int = 23, tells_pass: bool = False) -> None:
        self.count, self.first, self.read = count, 0, 0
        if tells_pass:
            self.set_epoch = self._set_epoch

    def _set_epoch(self, epoch: int) -> None:
        self.first = 1000 * epoch

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.read += 1
            torch.rand(1)
            yield self.first + number


class Stateful(Numbers):
    """The same, with a state; goes on where it stands, as torchdata's data sets do."""

    def __init__(self, count: int = 23) -> None:
        super().__init__(count)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[int]:
        while self.at < self.count:
            self.at += 1
            self.read += 1
            yield self.at - 1


def source(dataset: Any, shuffle_buffer: int = 0) -> Source:
    return Source(dataset, shuffle_buffer=shuffle_buffer, seed=(3,))


def rest_of_pass(one: Source) -> list[int]:
    taken: list[int] = []
    while one.look(1):
        taken.append(one.take())
    return taken


@pytest.mark.parametrize("kind", [Numbers, Stateful])
def test_pass_after_pass_whatever_is_looked_at_before(kind: type[Numbers]) -> None:
    one = source(kind())
    for _ in range(3):
        assert one.look(4) == [0, 1, 2, 3] and one.place == 0
        assert rest_of_pass(one) == list(range(23)) and one.look(1) == []
        one.next_pass()
    assert one.look(2) == [0, 1] and one.passes == 3
    one.take()
    one.next_pass()  # in its middle
    assert rest_of_pass(one) == list(range(23))


def test_a_data_set_is_told_the_pass() -> None:
    one = source(Numbers(5, tells_pass=True))
    rest_of_pass(one)
    one.next_pass()
    assert rest_of_pass(one) == [1000, 1001, 1002, 1003, 1004]


@pytest.mark.parametrize("kind", [Numbers, Stateful])
@pytest.mark.parametrize("shuffle_buffer", [0, 1, 4, 9, 100])
def test_it_goes_on_from_every_place(kind: type[Numbers], shuffle_buffer: int) -> None:
    whole = source(kind(), shuffle_buffer)
    passes = []
    for _ in range(2):
        passes.append(rest_of_pass(whole))
        whole.next_pass()
    assert all(sorted(each) == list(range(23)) for each in passes)
    if shuffle_buffer > 1:
        assert passes[0] != passes[1] and passes[0] != sorted(passes[0])
        for start in range(0, 23, shuffle_buffer):
            block = passes[0][start : start + shuffle_buffer]
            assert sorted(block) == list(range(start, min(start + shuffle_buffer, 23)))
    for number, place in itertools.product(range(2), range(24)):
        one = source(kind(), shuffle_buffer)
        for _ in range(number):
            rest_of_pass(one)
            one.next_pass()
        for count in range(place):
            one.look(1)
            one.take()
            if count % 3 == 0:
                one.mark()
        one.mark()
        one.look(5)
        dataset = kind()
        other = source(dataset, shuffle_buffer)
        rest_of_pass(other)  # it has been elsewhere
        dataset.read = 0
        other.load_state_dict(one.state_dict())
        assert (other.passes, other.place) == (number, place) and other.state_dict() == one.state_dict()
        assert other.look(2) == one.look(2)
        assert kind is Numbers or dataset.read <= max(2 * shuffle_buffer, 2)
        assert rest_of_pass(other) == passes[number][place:] == rest_of_pass(one)


def test_states_of_places_that_are_gone_are_not_kept() -> None:
    class State(dict[str, int]):
        pass

    class Kept(Stateful):
        def state_dict(self) -> dict[str, int]:
            return State(at=self.at)

    one = source(Kept(1000), shuffle_buffer=5)
    assert len(rest_of_pass(one)) == 1000
    assert sum(type(each) is State for each in gc.get_objects()) < 5


def test_reading_over_leaves_the_generators_as_they_are() -> None:
    one = source(Numbers())
    one.look(10)
    for _ in range(10):
        one.take()
    other = source(Numbers())
    other.load_state_dict(one.state_dict())
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.get_rng_state()
    other.look(0)
    assert torch.equal(torch.get_rng_state(), expected)
    other.look(1)
    torch.manual_seed(5)
    torch.rand(1)  # of the eleventh example alone
    assert other.take() == 10


def test_a_place_that_is_not_there_any_more() -> None:
    one = source(Numbers())
    one.look(20)
    for _ in range(20):
        one.take()
    other = source(Numbers(12))
    other.load_state_dict(one.state_dict())
    with pytest.raises(CheckpointError, match="ends after 12 examples of pass 0; it had more than 20"):
        other.look(1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"buffer": 4}, "sampling.shuffle_buffer = 4, here 0"),
        ({"place": -1}, "its place in the stream is none"),
        ({"pass": 0.5}, "its place in the stream is none"),
        ({"anchor": {"place": 2, "buffers": 0, "state": {"at": 2}}}, "here it has no state_dict"),
        ({"anchor": {"place": 9, "buffers": 0, "state": None}}, "its place in the stream is none"),
    ],
)
def test_states_that_are_refused(change: dict[str, Any], words: str) -> None:
    state = {"pass": 0, "place": 3, "buffer": 0, "anchor": {"place": 0, "buffers": 0, "state": None}} | change
    with pytest.raises(CheckpointError, match=words):
        source(Numbers()).check_state(state)
