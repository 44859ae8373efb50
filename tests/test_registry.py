"""The parts of a run's state: by name, looked at before any is taken, missing ones said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp.errors import CheckpointError
from ddp.noise.shards import ShardWatch
from ddp.training.registry import Registry
from ddp.training.saving import Best

PATH = Path("runs/run/checkpoints/step-00000004")


class Counter:
    """What a later part looks like."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def registry(**parts: Counter) -> Registry:
    made = Registry()
    for name, part in parts.items():
        made.add(name, part, owner="rank" if name == "own" else "rank alone" if name == "alone" else "all")
    return made


def test_what_registers_is_saved_and_comes_back() -> None:
    before = registry(average=Counter(1), patience=Counter(2), own=Counter(3), alone=Counter(4))
    shared, own = before.shared(), before.own()
    assert (shared.keys(), own.keys()) == ({"average", "patience"}, {"own", "alone"})
    parts = {name: Counter() for name in ("average", "patience", "own", "alone")}
    after = registry(**parts)
    after.check(PATH, shared, own)
    assert [part.value for part in parts.values()] == [0, 0, 0, 0]
    assert after.restore(PATH, shared, own, newcomer=False) == []
    assert [part.value for part in parts.values()] == [1, 2, 3, 4]


def test_a_rank_that_is_new_takes_a_copy_but_no_generators() -> None:
    own, alone = Counter(), Counter(9)
    registry(own=own, alone=alone).restore(PATH, {}, {"own": {"value": 3}, "alone": {"value": 4}}, newcomer=True)
    assert (own.value, alone.value) == (3, 9)


def test_a_part_that_came_later_begins_afresh_unless_it_is_needed() -> None:
    made = registry(average=Counter(5))
    made.check(PATH, {}, {})
    assert made.restore(PATH, {}, {}, newcomer=False) == ["average"]
    made.add("parameters", Counter(), required=True, remedy="bring the model back")
    with pytest.raises(CheckpointError, match=f"{PATH}: has no state of parameters; bring the model back"):
        made.check(PATH, {"average": {"value": 1}}, {})


def test_nothing_is_taken_of_a_checkpoint_that_one_part_cannot_read() -> None:
    average = Counter(5)
    made = registry(average=average, patience=Counter())
    with pytest.raises(
        CheckpointError, match=r"the state of patience cannot be read: KeyError\('value'\); start a new"
    ):
        made.check(PATH, {"average": {"value": 1}, "patience": {}}, {})
    assert average.value == 5


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="average is registered already"):
        registry(average=Counter()).add("average", Counter())


@pytest.mark.parametrize(
    "goal, entering", [("max", [True, True, False, True, False]), ("min", [True, True, True, False, False])]
)
def test_the_best_values_so_far(goal: Any, entering: list[bool]) -> None:
    best = Best(2, goal)
    assert [best.enters(value) for value in (0.5, 0.6, 0.4, 0.7, float("nan"))] == entering
    again = Best(2, goal)
    again.load_state_dict(best.state_dict())
    assert again == best
    assert not Best(0, goal).enters(1.0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_watch_over_shards_goes_on_where_it_was(ranks: int) -> None:
    """Sorted shards are named in the same step, with the watch saved and loaded in between."""
    generator = np.random.default_rng(5)
    offsets = generator.normal(size=(ranks, 8))
    steps = [(generator.random(ranks) + 1, offsets + generator.normal(size=(ranks, 8))) for _ in range(150)]
    whole, watch = ShardWatch(), ShardWatch()
    for step, (norms, projections) in enumerate(steps):
        if step % 17 == 5:
            state = watch.state_dict()
            watch = ShardWatch()
            watch.load_state_dict(state)
        said = [each.observe(norms.tolist(), projections) for each in (whole, watch)]
        assert said[0] == said[1]
        assert whole.z == watch.z
        if said[0]:
            return
    pytest.fail("never named")
