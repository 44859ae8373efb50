"""What a range test's curve says, against curves that are known by formula and against gradient descent in plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddp.lr_finder.curve import (
    BASELINE_SHARE,
    Baseline,
    BlowUpWatch,
    Curve,
    continued_rates,
    exponential_rates,
    features,
    middle,
    smoothed,
    zoomed_range,
)
from ddp.lr_finder.finding import Finding, RangePass, to_json

STEPS = 100
RATES = exponential_rates(1e-7, 10.0, STEPS)


def _swept(loss_after: list[float], first: float, end: str = "range") -> Curve:
    return Curve(RATES[: len(loss_after)], (first, *loss_after), end)  # type: ignore[arg-type]


def _valley(rates: np.ndarray, down: float, up: float) -> np.ndarray:
    """From 1 down to 0 around `down` and back up around `up`, on the logarithm of the rate."""
    where = np.log(rates)
    fall = 1 / (1 + np.exp(3 * (where - math.log(down))))
    rise = 1 / (1 + np.exp(-3 * (where - math.log(up))))
    return fall + rise


def test_rates_rise_by_equal_factors_and_go_on_so() -> None:
    rates = continued_rates(exponential_rates(0.01, 1.0, 21), 10.0)
    assert len(rates) == 31 and rates[-1] == pytest.approx(10.0)
    assert np.allclose(np.diff(np.log(rates)), math.log(100) / 20)
    assert continued_rates(RATES, 10.0) == RATES


def test_smoothing_is_the_mean_of_two_weighted_means() -> None:
    values = np.random.default_rng(0).normal(size=17)
    beta, expected = math.exp(-1 / 6), []
    for index in range(17):
        before, after = beta ** np.arange(index, -1, -1), beta ** np.arange(17 - index)
        both = (np.average(values[: index + 1], weights=before), np.average(values[index:], weights=after))
        expected.append(sum(both) / 2)
    assert smoothed(values.tolist(), 100) == pytest.approx(expected)


def test_a_known_valley_is_measured_from_both_sides_whatever_scale_and_offset() -> None:
    line = _valley(np.array(RATES), 1e-3, 0.3)
    for scale, offset in ((1.0, 0.0), (40.0, 3.0), (0.01, -7.0)):
        found = features(_swept((scale * line + offset).tolist(), scale + offset), STEPS)
        assert found.kind == "found"
        assert found.half_way == pytest.approx(1e-3, rel=0.15)
        assert found.half_way_up == pytest.approx(0.3, rel=0.15)
        assert found.steepest == pytest.approx(1e-3, rel=0.25)
        assert middle(found.half_way, found.half_way_up, 5.0) == pytest.approx(math.sqrt(1e-3 * 0.3), rel=0.1)
        assert found.start < found.half_way < found.minimum < found.half_way_up


def test_steepest_and_half_way_are_where_the_formula_for_a_quadratic_has_them() -> None:
    h, per_e = 7.0, 1 / math.log(RATES[1] / RATES[0])
    found = features(_swept([math.exp(-2 * h * per_e * rate) for rate in RATES], 1.0), STEPS)
    assert found.kind == "open"
    assert found.steepest == pytest.approx(1 / (2 * h * per_e), rel=0.25)
    assert found.half_way == pytest.approx(math.log(2) / (2 * h * per_e), rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_middle_little(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(scale=0.25, size=STEPS + 1)
    line = _valley(np.array(RATES), 1e-3, 0.3) + noise[1:]
    found = features(_swept(line.tolist(), 1 + float(noise[0])), STEPS)
    assert found.kind == "found"
    assert 1 / 2 < middle(found.half_way, found.half_way_up, 5.0) / math.sqrt(1e-3 * 0.3) < 2


@pytest.mark.parametrize("steps", [40, 100, 300])
def test_noise_alone_is_flat(steps: int) -> None:
    kinds = []
    rates = exponential_rates(1e-7, 10.0, steps)
    for seed in range(200):
        losses = np.random.default_rng(seed).normal(2.3, 0.5, steps + 1).tolist()
        kinds.append(features(Curve(rates, tuple(losses), "range"), steps).kind)
    assert kinds.count("flat") >= 190


def test_a_loss_that_never_moves_is_flat() -> None:
    assert features(_swept([2.3] * STEPS, 2.3), STEPS).kind == "flat"
    assert features(_swept([0.0] * STEPS, 0.0), STEPS).kind == "flat"


def test_what_blows_up_before_it_comes_down() -> None:
    assert features(_swept([3.0, 9.0, 40.0], 2.3, "blown up"), STEPS).kind == "rises at once"
    assert features(_swept([2.3 + 1.3**i for i in range(15)], 2.3, "blown up"), STEPS).kind == "rises at once"
    late = features(_swept([2.3] * 70 + [9.0, 90.0], 2.3, "blown up"), STEPS)
    assert late.kind == "flat" and late.blow_up == RATES[71]


def test_what_is_no_number() -> None:
    assert features(Curve((), (), "not finite"), STEPS).kind == "not finite"
    assert features(_swept([2.31, 2.29, 2.3], 2.3, "not finite"), STEPS).kind == "not finite"
    assert features(_swept([2.31, 2.29] * 20, 2.3, "not finite"), STEPS).kind == "not finite"
    assert features(Curve((), (2.3,), "not finite"), STEPS).kind == "not finite"
    line = _valley(np.array(RATES[:80]), 1e-4, 1e3)
    found = features(_swept(line.tolist(), 1.0, "not finite"), STEPS)
    assert found.kind == "found" and found.half_way_up == found.blow_up == RATES[79]


def test_the_watch_stops_at_a_blow_up_and_not_at_noise() -> None:
    watch = BlowUpWatch(STEPS)
    quiet = np.random.default_rng(1).normal(2.3, 0.5, 60)
    assert not any(watch.observe(float(loss)) for loss in quiet)
    assert any(watch.observe(loss) for loss in (8.0, 30.0, 200.0))
    assert not any(BlowUpWatch(STEPS).observe(1e6) for _ in range(int(BASELINE_SHARE * STEPS)))
    knowing = BlowUpWatch(STEPS, Baseline(2.3, 0.1))
    assert knowing.observe(10.0)


def _descend(curvatures: np.ndarray, rates: tuple[float, ...], steps: int, baseline: Baseline | None) -> Curve:
    """Gradient descent on sum h_i x_i^2 / 2 from x_i = 1, exactly, by the rates in turn."""
    x, losses, watch = np.ones_like(curvatures), [], BlowUpWatch(steps, baseline)
    for rate in (*rates, rates[-1]):
        losses.append(float(0.5 * (curvatures * x**2).sum()))
        if watch.observe(losses[-1]):
            return Curve(rates[: len(losses) - 1], tuple(losses), "blown up")
        x = (1 - rate * curvatures) * x
    return Curve(rates, tuple(losses), "range")


def _pass(curvatures: np.ndarray, low: float, high: float, steps: int, baseline: Baseline | None = None) -> RangePass:
    curve = _descend(curvatures, continued_rates(exponential_rates(low, high, steps), 1e3), steps, baseline)
    return RangePass(low, high, steps, curve, features(curve, steps, baseline))


@pytest.mark.parametrize("largest", [0.05, 1.0, 30.0, 900.0])
@pytest.mark.parametrize("condition_number", [1.0, 20.0])
@pytest.mark.parametrize("steps", [60, 100, 400])
def test_the_best_rate_of_a_quadratic_is_met_within_a_factor_of_three(
    largest: float, condition_number: float, steps: int
) -> None:
    """The best constant rate is 2 / (h_max + h_min) (Nesterov 2004, theorem 2.1.15)."""
    curvatures = largest / np.geomspace(1.0, condition_number, 8)
    coarse = _pass(curvatures, 1e-7, 10.0, steps)
    low, high = zoomed_range(coarse.features, coarse.curve.rates[-1], 1e-7, 1e3)
    fine = _pass(curvatures, low, high, steps, coarse.features.baseline)
    best = 2 / (curvatures.max() + curvatures.min())
    found = Finding((coarse, fine), "sgd", 0.1, 64)
    assert found.recommended is not None and 1 / 3 < found.recommended / best < 3
    assert found.recommended < 2 / curvatures.max(), "stable"


def _finding(*passes: Curve) -> Finding:
    return Finding(
        tuple(RangePass(1e-7, 10.0, STEPS, each, features(each, STEPS)) for each in passes), "adam", 1e-3, 64
    )


def test_what_is_said_of_each_outcome() -> None:
    valley = _valley(np.array(RATES), 1e-3, 0.3).tolist()
    found = _finding(_swept(valley, 1.0))
    assert "Recommended: a learning rate of 0.017, in the middle between 0.0009," in found.verdict
    assert found.setting == "--set optimizer.learning_rate=0.017"
    open_ended = _finding(_swept(_valley(np.array(RATES), 1e-3, 1e9).tolist(), 1.0))
    assert open_ended.recommended == open_ended.half_way and "--to 1e+03" in open_ended.verdict
    for curve, words in (
        (_swept([2.3] * STEPS, 2.3), "does not come down by more than its noise"),
        (_swept([3.0, 9.0, 40.0], 2.3, "blown up"), "Begin lower: --from 1e-11"),
        (Curve((), (), "not finite"), "in the first step, before any update"),
        (_swept([2.3, 2.3], 2.3, "not finite"), "in step 4, at a rate of 1.2e-07, all of a sudden"),
    ):
        none = _finding(curve)
        assert none.recommended is None and none.setting is None
        assert none.verdict.startswith("No suggestion: ") and words in none.verdict


def test_a_zoomed_pass_that_sees_less_leaves_what_the_first_saw() -> None:
    valley = _valley(np.array(RATES), 1e-3, 0.3).tolist()
    first = _finding(_swept(valley, 1.0))
    assert _finding(_swept(valley, 1.0), _swept([1.0] * STEPS, 1.0)).recommended == first.recommended
    one_sided = _swept(_valley(np.array(RATES), 3e-3, 1e9).tolist(), 1.0)
    both = _finding(_swept(valley, 1.0), one_sided)
    assert both.half_way == pytest.approx(3e-3, rel=0.15) and both.half_way_up == first.half_way_up


def test_json_has_no_nan() -> None:
    import json

    for curve in (_swept([2.3] * STEPS, 2.3), Curve((), (), "not finite"), _swept([3.0, 9.0], 2.3, "blown up")):
        assert json.loads(json.dumps(to_json(_finding(curve)), allow_nan=False))["recommended"] is None
