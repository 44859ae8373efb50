"""Windows side by side, the headline, the cadence of sampling, and their state."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ddp.errors import CheckpointError
from ddp.metering.observation import step_units
from ddp.noise.moments import Moments, unbiased_moments
from ddp.noise.noise_scale import NoiseScaleWindow
from ddp.noise.sampling import LARGEST_INTERVAL, STEADY_INTERVAL, SamplingCadence
from ddp.noise.tracker import NoiseScaleTracker, PartMoments, StepMoments
from ddp.transport.row import StepRow

DRAW = np.random.default_rng(11)


def moments() -> Moments:
    return Moments(squared_norm=1 + 0.1 * DRAW.normal(), variance_trace=50 + 9 * DRAW.normal())


def step(*, preconditioned: bool = False, parts: tuple[str, ...] = ()) -> StepMoments:
    metrics: tuple[Any, ...] = ("plain", "preconditioned") if preconditioned else ("plain",)
    of_parts = [PartMoments("layer", name, metric, moments()) for metric in metrics for name in parts]
    return StepMoments("ranks", moments(), moments() if preconditioned else None, of_parts)


def test_each_window_reads_what_one_of_its_own_would() -> None:
    tracker, plain, layer = NoiseScaleTracker(500), NoiseScaleWindow(500), NoiseScaleWindow(500)
    for number in range(60):
        taken = step(preconditioned=number >= 50, parts=("a", "b") if number % 2 else ())
        readings = tracker.observe(taken, sampled_every=2)
        assert repr(readings.plain) == repr(plain.observe(taken.plain))
        assert readings.headline == ("preconditioned" if number >= 50 else "plain")
        assert [(each.name, each.metric) for each in readings.parts] == [
            (each.name, each.metric) for each in taken.parts
        ]
        for part, reading in zip(taken.parts, readings.parts, strict=True):
            if (part.name, part.metric) == ("a", "plain"):
                assert repr(reading.reading) == repr(layer.observe(part.moments))
    assert layer.reading.state == "resolved" and layer.reading.observations == 30
    assert readings.preconditioned is not None and readings.preconditioned.observations == 10


def test_the_parts_can_be_asked_for_at_any_time() -> None:
    tracker, layer = NoiseScaleTracker(None), NoiseScaleWindow(None)
    assert tracker.part_readings == ()
    for number in range(60):
        taken = step(parts=("a", "b") if number % 3 == 0 else ())
        tracker.observe(taken, sampled_every=3)
        if taken.parts:
            layer.take(taken.parts[0].moments)
    assert [(each.name, each.metric) for each in tracker.part_readings] == [("a", "plain"), ("b", "plain")]
    assert repr(tracker.part_readings[0].reading) == repr(layer.reading)


def test_parts_are_read_at_first_and_then_in_every_fourth_step_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], NoiseScaleWindow._read
    monkeypatch.setattr(NoiseScaleWindow, "_read", lambda window: reads.append(window) or read(window))
    tracker, layer, costs = NoiseScaleTracker(None), NoiseScaleWindow(None), []
    for number in range(1, 101):
        before, taken = len(reads), step(parts=("a", "b"))
        readings = tracker.observe(taken, sampled_every=1)
        costs.append(len(reads) - before)
        layer.take(taken.parts[0].moments)
        if number <= 50 or number % 4 == 0:
            assert repr(readings.parts[0].reading) == repr(layer.reading)
        else:
            assert readings.parts == ()
    assert costs == [3] * 50 + [1, 3, 1, 1] * 12 + [1, 3]


def test_the_cadence_counts_a_cost_that_comes_in_one_sampled_step_of_four() -> None:
    cadence = SamplingCadence("auto")
    for number in range(1, 100):
        cadence.observe(0.009 if number % 4 == 0 else 0.001, 0.1 + (0.009 if number % 4 == 0 else 0.001))
    assert cadence.every == 6  # 3 ms of 100 ms, on average


def test_a_step_that_is_not_finite_on_any_rank_leaves_all_windows_as_they_were() -> None:
    tracker = NoiseScaleTracker(None)
    for _ in range(26):
        tracker.observe(step(preconditioned=True, parts=("a",)), sampled_every=1)
    before = tracker.state_dict()
    for bad in (math.nan, math.inf):
        rows = [StepRow(4, 1.0), StepRow(4, bad, finite=0.0), StepRow(4, 2.0)]
        units = step_units(rows)
        assert units.units.count == 3
        nothing = units.units.moments(units.weighted_squared_norms, 1.0)
        assert nothing is None
        dropped = StepMoments("ranks", nothing, nothing, [PartMoments("layer", "a", "plain", nothing)])
        assert tracker.observe(dropped, sampled_every=1).method == "none"
    assert tracker.state_dict() == before


def test_rows_with_and_without_units_add_up() -> None:
    """Two ranks that tell their micro-batches apart, one that does not, one without examples."""
    norms, examples = [3.0, 5.0, 2.0, 7.0, 4.0], [2, 3, 4, 4, 5]

    def told(*places: int) -> StepRow:
        b, n = [examples[place] for place in places], [norms[place] for place in places]
        weighted = sum(x * y for x, y in zip(b, n, strict=True))
        return StepRow(
            sum(b), -1.0, units=len(b), weight=sum(b), weight_per_example=len(b), squared_weight_per_example=sum(b),
            weighted_squared_norms=weighted, weighted_preconditioned_norms=2 * weighted,
        )  # fmt: skip

    units = step_units([told(0, 1), told(2, 3), StepRow(5, 4.0), StepRow(0, math.nan)])
    assert units.method == "micro_batches" and math.isnan(units.weighted_preconditioned_norms)
    found = units.units.moments(units.weighted_squared_norms, 1.5, population=99)
    wanted = unbiased_moments(norms, examples, 1.5, population=99)
    assert found is not None and wanted is not None
    assert found.variance_trace == pytest.approx(wanted.variance_trace, rel=1e-12)
    assert found.squared_norm == pytest.approx(wanted.squared_norm, rel=1e-12)
    assert step_units([told(0, 1), told(2, 3)]).weighted_preconditioned_norms == 2 * (6 + 15 + 8 + 28)
    assert step_units([StepRow(3, 1.0), StepRow(4, 1.0)]).method == "ranks"
    assert step_units([StepRow(3, 1.0)]).method == step_units([]).method == "none"


def test_state_goes_on_bit_for_bit() -> None:
    one = NoiseScaleTracker(700)
    for _ in range(430):
        one.observe(step(preconditioned=True, parts=("a", "b.c")), sampled_every=1)
        one.cadence.observe(0.001, 0.1)
    other = NoiseScaleTracker(700)
    other.load_state_dict(one.state_dict())
    assert repr(other.readings.plain) == repr(one.readings.plain)
    assert other.readings.headline == "preconditioned" and other.cadence.every == one.cadence.every == 3
    after = step(preconditioned=True, parts=("a", "b.c"))
    assert repr(other.observe(after, sampled_every=1)) == repr(one.observe(after, sampled_every=1))
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"whole": {}},
        {"whole": {"plain": {"observations": 3}}},
        {"whole": {"strange": {}}},
        {"parts": [["layer", "a"]]},
        {"parts": 3},
        {"sampling": {"last": "soon"}},
    ],
    ids=json.dumps,
)
def test_a_state_that_cannot_be_read_changes_nothing(change: dict[str, Any]) -> None:
    tracker = NoiseScaleTracker(None)
    tracker.observe(step(parts=("a",)), sampled_every=1)
    tracker.cadence.observe(0.001, 0.1)
    before = tracker.state_dict()
    with pytest.raises(CheckpointError, match="cannot be read|does not hold|metrics"):
        tracker.load_state_dict(before | change)
    assert tracker.state_dict() == before
    with pytest.raises(CheckpointError, match="cannot be read"):
        tracker.load_state_dict({})


def test_the_cadence_spends_half_a_percent() -> None:
    cadence = SamplingCadence("auto")
    sampled = [number for number in range(1, 4001) if run_step(cadence, number, cost=0.002, rest=0.1)]
    assert cadence.every == 4  # 2 ms of 100 ms are 2 %
    late = [number for number in sampled if number > 2000]
    assert len(late) * 0.002 == pytest.approx(0.005 * 2000 * 0.1, rel=0.05)
    early = [number for number in sampled if number <= 200]
    assert len(early) == 99 + 25 + 16, "all to step 99, every second to 149, every third to 199"
    assert len(sampled) == pytest.approx(len(early) + 3800 / 4, rel=0.01), "what that costs of a run ends there"


def test_the_cadence_keeps_to_its_bounds_and_does_not_jump() -> None:
    dear, cheap, jolted = SamplingCadence("auto"), SamplingCadence("auto"), SamplingCadence("auto")
    for number in range(1, 400):
        run_step(dear, number, cost=1.0, rest=0.1)
        run_step(cheap, number, cost=1e-6, rest=0.1)
        run_step(jolted, number, cost=0.5 if number == 61 else 0.002, rest=9.0 if number % 17 == 0 else 0.1)
        assert number < 5 or jolted.every == 4
    assert (dear.every, cheap.every) == (LARGEST_INTERVAL, 1)


def test_a_given_k_is_kept_to() -> None:
    given = SamplingCadence(5)
    assert [number for number in range(1, 21) if given.is_due(number)] == [5, 10, 15, 20]
    run_step(given, 21, cost=9.0, rest=0.1)
    assert given.every == given.interval(22) == 5 and given.state_dict() == {}


def test_a_steady_cadence_is_the_same_whatever_steps_cost() -> None:
    dear, cheap, other = SamplingCadence("steady"), SamplingCadence("steady"), SamplingCadence("steady")
    for number in range(1, 1000):
        assert run_step(dear, number, cost=9.0, rest=0.1) == run_step(cheap, number, cost=1e-6, rest=0.1)
        if number == 500:
            other.load_state_dict(dear.state_dict())
            dear = other
    assert dear.every == dear.interval(1000) == STEADY_INTERVAL


def test_near_the_start_and_after_a_restart_more_steps_are_sampled() -> None:
    cadence, other = SamplingCadence("auto"), SamplingCadence("auto")
    sampled: list[int] = []
    for number in range(1, 2001):
        if run_step(cadence, number, cost=9.0, rest=0.1):
            sampled.append(number)
        if number == 1000:
            cadence.restart(1000)
        if number == 1500:
            other.load_state_dict(cadence.state_dict())
            cadence = other
    assert cadence.every == LARGEST_INTERVAL
    assert sampled[:99] == [*range(1, 100)]
    for since in (100, 200, 400, 1000):
        newest = [number for number in sampled if number <= since][-25:]
        assert newest[0] > since * 0.55, "25 observations lie in the last two fifths"
    renewed = [number - 1000 for number in sampled if number > 1000]
    assert renewed[:25] == [*range(1, 24), 25, 27]
    late = [later - one for one, later in pairwise(renewed) if one > 700]
    assert late == sorted(late) and (late[0], late[-1]) == (35, 39), "a fiftieth of 1,700 steps and more"


def run_step(cadence: SamplingCadence, number: int, *, cost: float, rest: float) -> bool:
    sampled = cadence.is_due(number)
    if sampled:
        cadence.took(number)
    cadence.observe(cost if sampled else 0.0, rest + (cost if sampled else 0.0))
    return sampled
