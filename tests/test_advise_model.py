"""The models behind the advice: what they were made from comes back, and what they project is counted out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from ddp.diagnostics import communication, step_time
from ddp.diagnostics.communication import Communication, Links, Measured
from ddp.diagnostics.scaling import PAYS, Baseline, Scaling
from ddp.diagnostics.step_time import StepCost
from ddp.noise.estimate import Estimate
from ddp.telemetry.records import RunInfo, StepRecord
from telemetry_records import run_info, step_records

FREE = Communication(1, Links(8, 0.0, math.inf, 0.0, math.inf))
LINKS = Links(4, 3e-6, 8e9, 5e-5, 1e9)

# Communication


def test_one_rank_does_not_communicate() -> None:
    assert Communication(10**8, LINKS).seconds(1) == 0.0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_inside_a_node_a_ring_passes_every_slice_twice(ranks: int) -> None:
    """r - 1 messages of bytes / r for the sums, and as many to hand them out."""
    messages = 2 * (ranks - 1)
    assert Communication(10**8, LINKS).seconds(ranks) == pytest.approx(messages * (3e-6 + 10**8 / ranks / 8e9))


def test_between_nodes_comes_on_top_of_that_inside() -> None:
    model = Communication(10**8, LINKS)
    assert model.seconds(12) == pytest.approx(model.seconds(4) + 4 * (5e-5 + 10**8 / 3 / 1e9))
    assert model.seconds(9) == model.seconds(12)  # three nodes, one of them not full


@pytest.mark.parametrize("seconds", [1e-6, 2e-3, 0.5])
@pytest.mark.parametrize(("world_size", "nodes"), [(2, 1), (4, 1), (8, 2), (3, 3)])
def test_the_measured_time_comes_back(world_size: int, nodes: int, seconds: float) -> None:
    links = replace(LINKS, ranks_per_node=world_size // nodes)
    model = communication.fit(Measured(10**6, world_size, nodes, seconds), links)
    assumed_inside = communication.Communication(10**6, links).seconds(world_size // nodes) if nodes > 1 else 0.0
    if assumed_inside < seconds / 2:
        assert model.seconds(world_size) == pytest.approx(seconds)
    assert (model.inside_measured, model.between_measured) == (nodes == 1, nodes > 1)
    assert 0 < model.links.link_bytes_per_second < math.inf and 0 < model.links.node_bytes_per_second < math.inf


def test_one_rank_measures_nothing_and_says_so() -> None:
    model = communication.fit(Measured(10**6, 1, 1, 0.0), LINKS)
    assert model.links == LINKS
    assert "as measured" not in model.basis and "4 ranks a node" in model.basis
    assert "as measured" in communication.fit(Measured(10**6, 2, 1, 1e-3), LINKS).basis


# Where the time of a step goes


def records(
    info: RunInfo, batches: list[int], seconds: Callable[[int], float], all_reduce: float = 0.0, besides: float = 0.0
) -> list[StepRecord]:
    """Steps of `batches` examples whose ranks compute for `seconds` of their share; rank 1 takes 10 % more."""
    made, clock = [], 0.0
    phases: list[dict[str, float]] = []
    template = step_records(info, 1)[0]
    for number, batch in enumerate(batches, start=info.start_step + 1):
        shown = tuple(phases) or tuple(dict.fromkeys(template.phase_seconds[0], 0.0) for _ in range(info.world_size))
        computing = [seconds(batch // info.world_size) * (1.1 if rank == 1 else 1.0) for rank in range(info.world_size)]
        clock += max(computing) + all_reduce + besides
        made.append(replace(template, step=number, unix_time=clock, examples=batch, phase_seconds=shown))
        phases = [
            {
                "data": 0.1 * own,
                "forward": 0.3 * own,
                "backward": 0.6 * own,
                "all_reduce": all_reduce,
                "wait": max(computing) - own,
                "optimizer": besides / 2,
            }
            for own in computing
        ]
    return made


def fitted(info: RunInfo, made: list[StepRecord], trials: list[tuple[int, float]] | None = None) -> StepCost:
    cost = step_time.fit(info, step_time.observe(info, made), trials or [])
    assert cost is not None
    return cost


INFO = replace(run_info(), micro_batch_size=32)


def test_what_the_steps_were_made_of_comes_back() -> None:
    """Micro-batches of 4 to 32 examples: 2 ms each and 0.1 ms an example."""
    batches = [64, 8, 32, 16] * 8 + [64] * 20
    made = records(INFO, batches, lambda own: 2e-3 + 1e-4 * own, all_reduce=5e-4, besides=3e-3)
    cost = fitted(INFO, made)
    assert cost.split_by == "run"
    assert cost.micro_batch_seconds == pytest.approx(1.05 * 2e-3, rel=1e-6)  # the mean of both ranks
    assert cost.example_seconds == pytest.approx(1.05 * 1e-4, rel=1e-6)
    assert cost.step_seconds == pytest.approx(3e-3)
    assert cost.all_reduce_seconds == pytest.approx(5e-4)
    assert cost.waiting_share == pytest.approx(1.1 / 1.05 - 1)
    same = Measured(INFO.gradient_bytes, 2, 1, cost.all_reduce_seconds)
    assert cost.seconds(2, 64, communication.fit(same, LINKS)) == pytest.approx(cost.measured_seconds)


def test_an_evaluation_between_two_steps_does_not_count() -> None:
    made = records(INFO, [64] * 40, lambda own: 1e-3)
    late = [replace(each, unix_time=each.unix_time + 5.0 * (each.step // 10)) for each in made]
    assert fitted(INFO, late).measured_seconds == pytest.approx(fitted(INFO, made).measured_seconds)


def test_a_run_of_one_size_cannot_tell_a_micro_batch_from_its_examples() -> None:
    made = records(INFO, [64] * 40, lambda own: 2e-3 + 1e-4 * own)
    cost = fitted(INFO, made)
    assert (cost.split_by, cost.micro_batch_seconds) == ("nothing", 0.0)
    assert cost.computing(32) == pytest.approx(1.05 * (2e-3 + 32e-4))


def test_trials_tell_it_by_their_proportion_alone() -> None:
    """On a machine three times as fast as the run's."""
    made = records(INFO, [64] * 40, lambda own: 2e-3 + 1e-4 * own)
    cost = fitted(INFO, made, [(examples, (2e-3 + 1e-4 * examples) / 3) for examples in (8, 16, 32, 64)])
    assert cost.split_by == "trials"
    assert cost.micro_batch_seconds == pytest.approx(1.05 * 2e-3)
    assert cost.computing(64) == pytest.approx(1.05 * (2 * 2e-3 + 64e-4))  # two micro-batches


def test_steps_of_another_part_or_not_next_to_each_other_are_left_out() -> None:
    made = records(INFO, [64] * 10, lambda own: 1e-3)
    assert len(step_time.observe(INFO, made)) == 9
    assert len(step_time.observe(INFO, [*made[:4], *made[5:]])) == 7
    assert len(step_time.observe(replace(INFO, start_step=6), made)) == 3
    assert step_time.observe(replace(INFO, world_size=3), made) == []


def test_few_steps_say_nothing() -> None:
    made = records(INFO, [64] * 5, lambda own: 1e-3)
    assert step_time.fit(INFO, step_time.observe(INFO, made)) is None


def test_half_of_one_batch_size_and_half_of_another_is_neither() -> None:
    def of(batches: list[int]) -> list[StepRecord]:
        made = records(INFO, batches, lambda own: own * 1e-4 + 1e-3)
        return [replace(record, global_batch_size=record.examples) for record in made]

    info = replace(INFO, micro_batch_size=64)
    cost = step_time.fit(info, step_time.observe(info, of([64] * 60 + [128] * 20)))
    assert cost is not None and (cost.measured_batch_size, cost.measured_steps) == (128, 19)
    assert cost.example_seconds == pytest.approx(1.05e-4) and cost.split_by == "run"
    cost = step_time.fit(info, step_time.observe(info, of([64] * 60 + [128] * 4)))
    assert cost is not None and cost.measured_batch_size == 64


def test_times_that_fall_with_the_size_tell_nothing_apart() -> None:
    made = records(INFO, [64] * 20, lambda own: 1e-3)
    falling = [(2, 0.0030), (4, 0.0029), (8, 0.0028), (16, 0.0027)]
    cost = step_time.fit(INFO, step_time.observe(INFO, made), falling)
    assert cost is not None and cost.split_by == "nothing" and cost.example_seconds > 0


# More ranks

COST = StepCost(
    example_seconds=1e-4,
    micro_batch_seconds=0.0,
    step_seconds=0.0,
    all_reduce_seconds=0.0,
    waiting_share=0.0,
    micro_batch_size=1 << 20,
    measured_seconds=3.2e-3,
    measured_batch_size=64,
    measured_steps=100,
    split_by="run",
)
BASE = Baseline(global_batch_size=64, world_size=2, steps=1000, training_examples=1 << 20)


def scaling(noise_scale: Estimate | None, cost: StepCost = COST, model: Communication = FREE) -> Scaling:
    return Scaling(BASE, cost, model, noise_scale, lambda b, before, after: (1 + b / before) / (1 + b / after))


NOISE = Estimate(71.0, 56.0, 92.0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 16, 512])
def test_a_row_is_the_model_written_out(ranks: int) -> None:
    (row,) = scaling(NOISE).rows([ranks])
    assert row.grown is not None and row.grown.data_efficiency is not None
    batch = 32 * ranks
    expected = {end: 1000 * (1 + b / batch) / (1 + b / 64) for end, b in (("value", 71), ("low", 56), ("high", 92))}
    assert row.grown.global_batch_size == batch
    assert row.grown.seconds.value == pytest.approx(expected["value"] * 32e-4)
    assert [row.grown.seconds.low, row.grown.seconds.high] == pytest.approx(
        sorted([expected["low"] * 32e-4, expected["high"] * 32e-4])
    )
    assert row.grown.rank_hours.value == pytest.approx(ranks * row.grown.seconds.value / 3600)
    assert row.grown.data_efficiency.low == pytest.approx(1 / (1 + batch / 56))
    assert row.grown.learning_rate_factor is not None
    assert row.grown.learning_rate_factor.value == pytest.approx((1 + 71 / 64) / (1 + 71 / batch))
    if ranks <= 64:
        assert row.same is not None and row.same.seconds.low == row.same.seconds.high
        assert row.same.seconds.value == pytest.approx(1000 * 1e-4 * math.ceil(64 / ranks))
    else:
        assert row.same is None


def test_at_the_runs_own_ranks_both_ways_are_the_run() -> None:
    (row,) = scaling(NOISE).rows([2])
    assert row.same is not None and row.grown is not None
    assert row.same.seconds == row.grown.seconds == Estimate(3.2, 3.2, 3.2)


def test_without_a_noise_scale_only_the_same_batch_is_projected() -> None:
    found = scaling(None)
    (row,) = found.rows([4])
    assert row.same is not None and (row.grown, row.fastest_batch) == (None, None)
    assert found.grown_stops_paying() is None


def test_without_communication_ranks_pay_until_the_batch_is_half_the_noise_scale() -> None:
    """(1 + B/b)/(1 + B/2b) = 3/2 at b = B/2: 512 is the first batch past 500, 256 past 250, 2,048 past 2,000."""
    noise = Estimate(1000.0, 500.0, 4000.0)
    stops = scaling(noise).grown_stops_paying()
    assert stops is not None
    assert (stops.ranks, stops.low, stops.high) == (16, 8, 64)
    batch = 32 * 16
    assert stops.cost.value == pytest.approx((1 + batch / noise.value) / (1 + 32 / noise.value))


def test_stops_paying_is_what_the_rows_say() -> None:
    costly = replace(COST, step_seconds=4e-4, waiting_share=0.05)
    found = scaling(NOISE, costly, Communication(10**6, LINKS))
    for stops, way in ((found.same_stops_paying(), found.same), (found.grown_stops_paying(), found.grown)):
        assert stops is not None and stops.ranks is not None
        seconds = []
        for power in range(int(math.log2(stops.limit)) + 1):
            projected = way(1 << power)
            assert projected is not None
            seconds.append(projected.seconds.value)
        gains = [before / after for before, after in pairwise(seconds)]
        first = next(index for index, gain in enumerate(gains) if gain < PAYS)
        assert stops.ranks == 1 << first


def test_where_every_doubling_pays_the_limit_is_told() -> None:
    stops = scaling(Estimate(1e9, 1e8, math.inf)).grown_stops_paying()
    assert stops is not None
    assert (stops.ranks, stops.low, stops.high) == (None, None, None)
    assert stops.limit == 1 << 15  # 32 examples each of 2^20
    same = scaling(NOISE).same_stops_paying()
    assert (same.ranks, same.limit) == (None, 64)


def test_the_fastest_batch_is_the_least_of_all_batches_tried_out() -> None:
    costly = replace(COST, step_seconds=2e-3)
    found = scaling(NOISE, costly, Communication(10**6, LINKS))
    for ranks in (1, 4, 16):
        (row,) = found.rows([ranks])
        assert row.fastest_batch is not None
        batches = range(ranks, 6000, ranks)  # equal shares: no rank waits for a larger one
        best = min(batches, key=lambda b: (1 + 71 / b) * costly.seconds(ranks, b, found.communication))
        assert row.fastest_batch.value == pytest.approx(max(best, ranks), abs=ranks)
        assert row.fastest_batch.low < row.fastest_batch.value < row.fastest_batch.high


@pytest.mark.parametrize(("micro_batch_seconds", "noise_scale"), [(5e-3, 85.0), (5e-3, 4000.0), (2e-4, 4000.0)])
def test_the_fastest_batch_fills_micro_batches_before_it_takes_more(
    micro_batch_seconds: float, noise_scale: float
) -> None:
    """Where a forward and a backward cost much whatever their size, as on a GPU, tiny batches waste them."""
    costly = replace(COST, step_seconds=1e-4, micro_batch_seconds=micro_batch_seconds, micro_batch_size=32)
    found = scaling(Estimate.exactly(noise_scale), costly)
    for ranks in (1, 4):
        (row,) = found.rows([ranks])
        assert row.fastest_batch is not None

        def seconds(b: float) -> float:
            return (1 + noise_scale / b) * costly.seconds(ranks, round(b), found.communication)  # noqa: B023

        chosen = ranks * round(row.fastest_batch.value / ranks)
        assert seconds(chosen) <= 1.1 * min(map(seconds, range(ranks, 6000, ranks)))
