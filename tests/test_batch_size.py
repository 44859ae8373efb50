"""The adaptive batch size, against costs and noise scales that are known, and against a search over all sizes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from ddp.noise.noise_scale import Reading, State
from ddp.training.batch_size import BatchSizeController, Change, Limits, StepCost, StepTimes, best_batch_size
from ddp.transport.row import StepRow

OPEN = Limits(smallest=2, largest=10_000, world_size=2)


def reading(noise_scale: float, observations: int, state: State = "resolved") -> Reading:
    return Reading(
        state, noise_scale, 0.8 * noise_scale, 1.3 * noise_scale, 1.0, noise_scale, observations, 25, 0.0, False
    )


@dataclass
class Machine:
    """Ranks whose steps cost what `cost` says, rank 0 the slowest; times of a step are in the rows of the next."""

    cost: StepCost
    ranks: int = 2
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.last: list[StepRow] = [StepRow(1.0, 1.0) for _ in range(self.ranks)]

    def step(self, examples: int, micro_batches: int) -> list[StepRow]:
        rows = self.last
        work = self.cost.micro_batch * micro_batches + self.cost.example * examples
        self.last = [
            StepRow(
                examples / self.ranks,
                1.0,
                data_seconds=0.1 * own,
                forward_seconds=0.3 * own,
                backward_seconds=0.6 * own,
                all_reduce_seconds=0.6 * self.cost.fixed,
                wait_seconds=0.1 * self.cost.fixed + work - own,
                optimizer_seconds=0.3 * self.cost.fixed,
            )
            for own in (work * (1 + self.jitter * abs(self.random.normal())) * (1 - 0.1 * r) for r in range(self.ranks))
        ]
        return rows


def run(
    controller: BatchSizeController, machine: Machine, noise_scale: float, steps: int, first_observation: int = 0
) -> list[tuple[int, Change]]:
    """Changes and the observation they came at; every step of the run is one observation."""
    changes: list[tuple[int, Change]] = []
    for observation in range(first_observation + 1, first_observation + steps + 1):
        share = -(-controller.size // machine.ranks)
        micro_batches = -(-share // controller.micro_batch_size)
        rows = machine.step(controller.size, micro_batches)
        state = "resolved" if observation >= 25 else "unresolved"
        change = controller.observe(controller.size, micro_batches, rows, reading(noise_scale, observation, state))
        if change is not None:
            changes.append((observation, change))
    return changes


def test_the_best_size_is_the_one_that_a_search_finds() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        fixed, micro, example = 10.0 ** random.uniform(-4, -1, 3)
        noise_scale = float(10 ** random.uniform(0, 4))
        held = int(random.integers(1, 200))
        limits = replace(OPEN, micro_batch_size=held)
        cost = StepCost(float(fixed), float(micro), float(example) / 100)
        sizes = np.geomspace(0.1, 1e6, 20_001)
        micro_batches = np.maximum(sizes / (2 * held), 1.0)  # not rounded up: between the steps of the staircase
        seconds = (cost.fixed + cost.micro_batch * micro_batches + cost.example * sizes) * (1 + noise_scale / sizes)
        assert best_batch_size(noise_scale, cost, limits) == pytest.approx(sizes[seconds.argmin()], rel=2e-3)


def test_beyond_one_micro_batch_a_rank_takes_full_ones() -> None:
    """196 examples at 32 a micro-batch are 4 for each of two ranks, and 192 are 3: the last one for nothing."""
    controller = BatchSizeController(Limits(smallest=2, largest=4096, world_size=2, micro_batch_size=32), 128)
    sizes = [controller._rounded(size) for size in (64.0, 70.0, 196.0, 225.0)]
    assert sizes == [64, 64, 192, 256]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("held", [None, 7, 60])
def test_rounding_makes_no_change_of_more_than_a_doubling(ranks: int, held: int | None) -> None:
    """The wish is at most a doubling; full micro-batches and equal shares are given up where they would make it more."""
    for size in range(max(ranks, 4), 400):
        limits = Limits(smallest=1, largest=10_000, world_size=ranks, micro_batch_size=held)
        controller = BatchSizeController(limits, size)
        for ratio in (0.5, 0.6, 2 / 3, 1.5, 1.7, 2.0):
            if round(size * ratio) >= ranks:
                after = controller._rounded(size * ratio)
                assert size / 2 - 0.5 <= after <= 2 * size, (size, ratio)
                assert after > 1.3 * size if ratio > 1 else after < 0.8 * size, (size, ratio)


def test_without_a_limit_it_is_the_square_root() -> None:
    assert best_batch_size(50.0, StepCost(2e-3, 1e-3, 3e-5), OPEN) == pytest.approx(math.sqrt(50 * 3e-3 / 3e-5))


@pytest.mark.parametrize("start", [2, 16, 64, 256, 1000])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_from_any_start_it_comes_near_the_best_and_stays(start: int, jitter: float) -> None:
    cost = StepCost(fixed=1e-3, micro_batch=2e-3, example=4e-5)
    best = math.sqrt(60 * 3e-3 / 4e-5)  # 67
    controller = BatchSizeController(OPEN, start)
    changes = run(controller, Machine(cost, jitter=jitter), 60.0, 400)
    assert best / 1.6 < controller.size < best * 1.6
    for (_, one), (_, other) in pairwise(changes):
        assert other.before == one.after
    assert run(controller, Machine(cost, jitter=jitter), 60.0, 200, first_observation=400) == []


def test_one_doubling_for_each_window_and_never_from_the_same_observations() -> None:
    controller = BatchSizeController(OPEN, 4)
    changes = run(controller, Machine(StepCost(1e-3, 0.0, 1e-6)), 1000.0, 200)
    assert [change.after for _, change in changes[:4]] == [8, 16, 32, 64]
    at = [observation for observation, _ in changes]
    assert at[0] >= 25 and all(later - earlier >= 25 for earlier, later in pairwise(at))
    assert (
        "noise scale 1000 (800-1300)" in changes[0][1].reason and "1 ms + 0.001 ms an example" in changes[0][1].reason
    )


@pytest.mark.parametrize("state", ["unresolved", "wide", "lower_bound", "beyond_data"])
def test_only_a_resolved_reading_moves_it(state: State) -> None:
    controller, machine = BatchSizeController(OPEN, 4), Machine(StepCost(1e-3, 0.0, 1e-6))
    for observation in range(1, 100):
        assert controller.observe(4, 1, machine.step(4, 1), reading(1000.0, observation, state)) is None
    assert controller.observe(4, 1, machine.step(4, 1), reading(1000.0, 100)) is not None


def test_steps_without_a_new_observation_do_not_count_as_a_window() -> None:
    controller, machine = BatchSizeController(OPEN, 4), Machine(StepCost(1e-3, 0.0, 1e-6))
    for _ in range(100):
        assert controller.observe(4, 1, machine.step(4, 1), reading(1000.0, 3)) is None


def test_the_overhead_of_a_micro_batch_is_told_before_any_change() -> None:
    # Forward and backward cost 4 ms + 20 us an example: taken as 4.3 / 16 ms an example the best would be 12.
    controller = BatchSizeController(OPEN, 16)
    changes = run(controller, Machine(StepCost(5e-4, 4e-3, 2e-5)), 60.0, 60)
    assert [change.after for _, change in changes] == [32, 64]


def test_times_by_layout_give_the_cost_back() -> None:
    cost = StepCost(1.3e-3, 2.1e-3, 4.4e-5)
    for layouts in ([(64, 1), (64, 2)], [(64, 1), (128, 1)], [(30, 2), (64, 4), (128, 4)]):
        times, machine = StepTimes(), Machine(cost)
        assert times.cost() is None
        for layout in layouts:
            machine.step(*layout)
            for _ in range(5):
                times.add(layout, machine.step(*layout))
        got = times.cost()
        assert got is not None
        # The slowest rank's own wait is part of what is fixed: here a tenth of it.
        assert [got.fixed, got.micro_batch, got.example] == pytest.approx([1.3e-3, 2.1e-3, 4.4e-5], rel=1e-6)


def test_where_layouts_do_not_tell_examples_carry_all() -> None:
    times, machine = StepTimes(), Machine(StepCost(1e-3, 2e-3, 1e-5))
    for layout in ((32, 2), (64, 4), (128, 8)):
        machine.step(*layout)
        for _ in range(4):
            times.add(layout, machine.step(*layout))
    got = times.cost()
    assert got is not None
    assert got.micro_batch == 0.0 and got.example == pytest.approx((8 * 2e-3 + 128 * 1e-5) / 128)


def test_it_stays_inside_its_limits_and_a_rank_holds_no_more_than_it_may() -> None:
    limits = Limits(smallest=6, largest=90, world_size=3, micro_batch_size=10)
    controller = BatchSizeController(limits, 12)
    run(controller, Machine(StepCost(1.0, 0.0, 1e-9), ranks=3), 1e4, 300)
    assert controller.size == 90 and controller.micro_batch_size == 10
    controller = BatchSizeController(limits, 12)
    run(controller, Machine(StepCost(1e-9, 0.0, 1.0), ranks=3), 1.0, 300)
    assert controller.size == 6 and controller.micro_batch_size == 2


def test_micro_batches_are_as_large_as_the_limit_allows_and_doubled_for_a_few_steps() -> None:
    def counts(limits: Limits, size: int) -> list[int]:
        controller, machine, result = BatchSizeController(limits, size), Machine(StepCost(1e-3, 1e-3, 1e-5)), []
        for _ in range(14):
            result.append(math.ceil(size / 2 / controller.micro_batch_size))
            controller.observe(size, result[-1], machine.step(size, result[-1]), None)
        return result

    assert counts(OPEN, 64) == 6 * [1] + 6 * [2] + 2 * [1]
    assert counts(replace(OPEN, micro_batch_size=16), 64) == 6 * [2] + 6 * [4] + 2 * [2]
    assert counts(replace(OPEN, micro_batches=2), 64) == 6 * [2] + 6 * [4] + 2 * [2]
    assert counts(OPEN, 6) == 14 * [1]  # batch statistics want two examples at once


def test_ranks_that_see_the_same_decide_the_same_and_a_resumed_one_too() -> None:
    cost = StepCost(1e-3, 2e-3, 4e-5)
    one, other = (BatchSizeController(OPEN, 512) for _ in range(2))
    assert run(one, Machine(cost, jitter=0.3), 60.0, 70) == run(other, Machine(cost, jitter=0.3), 60.0, 70)
    again = BatchSizeController(OPEN, 512)
    again.load_state_dict(json.loads(json.dumps(one.state_dict())), same_ranks=True)
    assert again.state_dict() == one.state_dict() and again.size == one.size
    assert [change for _, change in run(again, Machine(cost), 60.0, 40, first_observation=70)] != []
    fewer = BatchSizeController(replace(OPEN, largest=100), 512)
    fewer.load_state_dict(one.state_dict(), same_ranks=False)
    assert fewer.size == 100 and fewer.state_dict()["times"]["layouts"] == []


def test_a_machine_that_slows_down_is_timed_anew() -> None:
    """Twice as slow after the first trial: with its old times the best would be 32 instead of 67."""
    limits = replace(OPEN, micro_batch_size=10_000)
    controller, machine = BatchSizeController(limits, 64), Machine(StepCost(1e-3, 2e-3, 4e-5))
    run(controller, machine, 60.0, 20)
    machine.cost = StepCost(2e-3, 4e-3, 8e-5)
    run(controller, machine, 60.0, 500, first_observation=20)
    cost = controller._times.cost()
    assert cost is not None and cost.micro_batch == pytest.approx(4e-3) and cost.example == pytest.approx(8e-5)
    assert 67 / 1.5 < controller.size < 67 * 1.5


def test_the_hooks_of_sampled_steps_do_not_count_as_what_a_batch_costs() -> None:
    times = StepTimes()
    for hooks in (0.0, 5e-3):
        row = StepRow(8.0, 1.0, backward_seconds=1e-2 + hooks, measuring_seconds=hooks + 1e-3, measure_seconds=1e-3)
        for _ in range(3):
            times.add((16, 1), [row])
    cost = times.cost()
    assert cost is not None and cost.example * 16 == pytest.approx(1e-2)


@pytest.mark.parametrize("every", [1, 2])
def test_one_rank_whose_batch_is_halved_for_the_noise_scale_still_tells_overhead_from_examples(every: int) -> None:
    """Steps in two halves at 64, where 67 is best: taken as one cost by the example, halves would have it at 24."""
    limits = Limits(smallest=2, largest=10_000, world_size=1, micro_batch_size=10_000)
    controller, machine = BatchSizeController(limits, 64), Machine(StepCost(1e-3, 2e-3, 4e-5), ranks=1)
    layouts = set()
    for step in range(1, 301):
        planned = -(-controller.size // controller.micro_batch_size)
        micro_batches = max(planned, 2 if step % every == 0 else 1)
        layouts.add((controller.size, micro_batches))
        rows = machine.step(controller.size, micro_batches)
        state: State = "resolved" if step >= 25 else "unresolved"
        assert controller.observe(controller.size, micro_batches, rows, reading(60.0, step, state)) is None, step
    assert layouts == ({(64, 2), (64, 4)} if every == 1 else {(64, 1), (64, 2), (64, 4)} - ({(64, 4)} - layouts))


def test_with_batch_statistics_no_step_is_split_to_be_timed() -> None:
    controller = BatchSizeController(replace(OPEN, may_split=False), 64)
    machine = Machine(StepCost(1e-3, 2e-3, 4e-5))
    for step in range(1, 100):
        assert controller.micro_batch_size == 32
        controller.observe(64, 1, machine.step(64, 1), reading(60.0, step, "wide"))
