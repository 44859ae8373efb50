"""The two curves against themselves, counted out, and the fastest batch against a search over all batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ddp.noise import efficiency
from ddp.noise.efficiency import between, data_efficiency, fastest_batch, step_efficiency
from ddp.noise.estimate import Estimate
from ddp.noise.noise_scale import Reading

NOISE_SCALES = (0.0, 0.3, 71.0, 5e4)


@pytest.mark.parametrize(
    ("noise_scale", "data", "step"), [(64.0, 0.5, 0.5), (192.0, 0.75, 0.25), (0.0, 0.0, 1.0), (math.inf, 1, 0)]
)
def test_efficiencies(noise_scale: float, data: float, step: float) -> None:
    assert data_efficiency(noise_scale, 64) == pytest.approx(data)
    assert step_efficiency(noise_scale, 64) == pytest.approx(step)


@pytest.mark.parametrize("noise_scale", NOISE_SCALES)
@pytest.mark.parametrize(("before", "after"), [(64, 128), (37, 1000), (512, 3)])
def test_ratios_are_those_of_the_curves(noise_scale: float, before: int, after: int) -> None:
    steps = [efficiency.steps(noise_scale, batch, 170.0) for batch in (before, after)]
    assert efficiency.steps_ratio(noise_scale, before, after) == pytest.approx(steps[1] / steps[0])
    assert steps == pytest.approx([170 * (1 + noise_scale / batch) for batch in (before, after)])
    if noise_scale:
        examples = [efficiency.examples(noise_scale, batch, 9e3) for batch in (before, after)]
        assert efficiency.examples_ratio(noise_scale, before, after) == pytest.approx(examples[1] / examples[0])
        assert examples == pytest.approx([9e3 * (1 + batch / noise_scale) for batch in (before, after)])


def test_the_curves_are_one_where_examples_are_steps_times_batch() -> None:
    """E = b S with E_min = B S_min."""
    for batch in (5, 64, 900):
        assert efficiency.examples(71.0, batch, 71.0 * 170) == pytest.approx(batch * efficiency.steps(71.0, batch, 170))


def test_without_noise_and_with_nothing_but_noise() -> None:
    assert efficiency.steps_ratio(0.0, 64, 128) == 1.0
    assert efficiency.examples_ratio(0.0, 64, 128) == 2.0
    assert efficiency.steps_ratio(math.inf, 64, 128) == 0.5
    assert efficiency.examples_ratio(math.inf, 64, 128) == 1.0
    assert efficiency.steps(math.inf, 64, 10) == math.inf
    assert efficiency.examples(0.0, 64, 10) == math.inf


@pytest.mark.parametrize("noise_scale", [math.nan, -3.0])
def test_what_is_not_known_stays_so(noise_scale: float) -> None:
    values = [
        data_efficiency(noise_scale, 64),
        step_efficiency(noise_scale, 64),
        efficiency.steps_ratio(noise_scale, 64, 128),
        efficiency.examples_ratio(noise_scale, 64, 128),
        efficiency.steps(noise_scale, 64, 10),
        efficiency.examples(noise_scale, 64, 10),
        fastest_batch(noise_scale, 1.0, 1.0),
    ]
    assert all(map(math.isnan, values))


@pytest.mark.parametrize(("noise_scale", "step", "example"), [(71.0, 8e-3, 2e-4), (4000.0, 0.05, 1e-3), (20, 1, 1)])
def test_the_fastest_batch_is_the_one_a_search_finds(noise_scale: float, step: float, example: float) -> None:
    seconds = {batch: (1 + noise_scale / batch) * (step + example * batch) for batch in range(1, 3000)}
    best = min(seconds, key=lambda batch: seconds[batch])
    assert abs(fastest_batch(noise_scale, step, example) - best) <= 1


def test_a_free_step_leaves_no_reason_for_a_batch() -> None:
    assert fastest_batch(71.0, 0.0, 1e-3) == 0.0
    assert fastest_batch(math.inf, 0.0, 1e-3) == 0.0
    assert fastest_batch(math.inf, 1.0, 1e-3) == math.inf
    assert fastest_batch(71.0, 1.0, 0.0) == math.inf
    assert fastest_batch(0.0, 1.0, 0.0) == 0.0


@pytest.mark.parametrize("function", [lambda b: data_efficiency(b, 64), lambda b: step_efficiency(b, 64)])
def test_an_interval_goes_through_by_its_ends_in_order(function: Callable[[float], float]) -> None:
    estimate = between(function, Estimate(71.0, 56.0, 92.0))
    assert estimate.low < estimate.value < estimate.high
    inside = [function(56 + share * 36) for share in (0.01, 0.3, 0.8, 0.99)]
    assert all(estimate.low < value < estimate.high for value in inside)


def test_a_lower_bound_is_open_at_its_top() -> None:
    """Its point may be finite: it is not one to believe."""
    reading = Reading("lower_bound", 400.0, 320.0, math.inf, 1.0, 71.0, 300, 100, 77.0, False)
    noise_scale = efficiency.noise_scale_of(reading)
    assert noise_scale == Estimate(math.inf, 320.0, math.inf)
    assert between(lambda b: data_efficiency(b, 64), noise_scale) == Estimate(1.0, 1 / 1.2, 1.0)
