"""The window, its readings and their states, against known answers and a slow numpy version of the same rules."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ddp.errors import CheckpointError
from ddp.noise.interval import PairedMeans, fieller, t_quantile
from ddp.noise.moments import Moments, unbiased_moments
from ddp.noise.noise_scale import NoiseScaleWindow, Reading, state_of, steps_needed
from noise_scale_populations import FLAT, gaussian

Pairs = NDArray[np.float64]  # tr(Sigma) and |G|^2 of each step, shape (steps, 2)


def _observe(window: NoiseScaleWindow, pairs: Pairs) -> list[Reading]:
    return [window.observe(Moments(variance_trace=trace, squared_norm=norm)) for trace, norm in pairs.tolist()]


def _linear_regression(rng: np.random.Generator, steps: int, counts: Sequence[int], delta: float = 1.0) -> Pairs:
    """x ~ N(0, I) in 20 dimensions, noise 2: tr(Sigma) = 21 delta^2 + 80, |G|^2 = delta^2, so B = 101 at delta 1."""
    ends = np.cumsum(counts)
    pairs = []
    for _ in range(steps):
        inputs = rng.normal(size=(ends[-1], 20))
        errors = delta * inputs[:, 0] - 2 * rng.normal(size=ends[-1])
        examples = inputs * errors[:, None]
        units = np.array([examples[end - n : end].mean(axis=0) for n, end in zip(counts, ends, strict=True)])
        mean_squared_norm = float((examples.mean(axis=0) ** 2).sum())
        moments = unbiased_moments((units**2).sum(axis=1), counts, mean_squared_norm)
        assert moments is not None
        pairs.append((moments.variance_trace, moments.squared_norm))
    return np.array(pairs)


def _noisy(rng: np.random.Generator, steps: int, trace: float, norm: float, spread: float = 0.3) -> Pairs:
    return np.array([trace, norm]) * (1 + spread * rng.normal(size=(steps, 2)))


def _covariance_of_means(pairs: Pairs) -> Pairs:
    differences = np.diff(pairs, axis=0)
    return differences.T @ differences / (2 * len(differences) * len(pairs))


def _reference_window(pairs: Pairs) -> tuple[Pairs, bool]:
    """The newest 25, doubled up to 400 while the doubled window's halves agree within two standard errors.

    True beside it where they did not.
    """
    size = min(len(pairs), 25)
    while size >= 25 and 2 * size <= min(len(pairs), 400):
        doubled = pairs[-2 * size :]
        gap = doubled[:size].mean(axis=0) - doubled[size:].mean(axis=0)
        if (np.abs(gap) > 2 * np.sqrt(4 * np.diag(_covariance_of_means(doubled)))).any():
            return pairs[-size:], True
        size *= 2
    return pairs[-size:], False


def _reference_drift(pairs: Pairs) -> bool:
    """Newey-West with Bartlett weights, written out, above twice the first-difference variance."""
    n = len(pairs)
    lag = math.floor(4 * (n / 100) ** (2 / 9))
    centred = pairs - pairs.mean(axis=0)
    total = (centred**2).sum(axis=0)
    for k in range(1, lag + 1):
        total += 2 * (1 - k / (lag + 1)) * (centred[k:] * centred[:-k]).sum(axis=0)
    return bool((total / n**2 > 2 * np.diag(_covariance_of_means(pairs))).any())


@pytest.mark.parametrize("counts", [(4, 4), (32, 32), (3, 14, 5), (40, 24)])
def test_linear_regression_has_the_known_noise_scale(counts: tuple[int, ...]) -> None:
    pairs = _linear_regression(np.random.default_rng(11), 1500, counts)
    for series, truth in ((pairs[:, 0], 101.0), (pairs[:, 1], 1.0), (pairs[:, 0] - 101 * pairs[:, 1], 0.0)):
        assert abs(series.mean() - truth) < 3 * series.std(ddof=1) / math.sqrt(len(series))


def test_a_reading_is_what_the_slow_version_says() -> None:
    """Through growth, a step change in each of the two means, and recovery; past a turn of the buffer."""
    rng = np.random.default_rng(4)
    stretches = [(520, 100, 1.0), (130, 100, 0.5), (150, 180, 0.5), (1200, 100, 1.0), (60, 30, 1.5)]
    pairs = np.concatenate([_noisy(rng, steps, trace, norm) for steps, trace, norm in stretches])
    readings = _observe(NoiseScaleWindow(None), pairs)
    for end in [*range(20, 820, 3), *range(1560, len(pairs), 7)]:
        reading, (kept, cut_short) = readings[end - 1], _reference_window(pairs[:end])
        assert (reading.observations, reading.window) == (end, len(kept))
        assert (reading.variance_trace, reading.squared_norm) == pytest.approx(tuple(kept.mean(axis=0)), rel=1e-12)
        if end < 25:
            continue
        (x, y), t2 = kept.mean(axis=0), ((1.2 if cut_short else 1.0) * stats.t.isf(0.025, 2 * (len(kept) - 1) / 3)) ** 2
        (vx, vxy), (_, vy) = _covariance_of_means(kept)
        low, plain = sorted(np.roots([y * y - t2 * vy, -2 * (x * y - t2 * vxy), x * x - t2 * vx]).real)
        vx, vxy = vx * (1 + math.sqrt(t2 * vx) / x) ** 2, vxy * (1 + math.sqrt(t2 * vx) / x)
        high = max(plain, *np.roots([y * y - t2 * vy, -2 * (x * y - t2 * vxy), x * x - t2 * vx]).real)
        assert (reading.low, reading.high) == pytest.approx((low, high), rel=1e-8)
        assert reading.noise_scale == pytest.approx(x / y, rel=1e-12)
        assert reading.drifting == _reference_drift(kept)


def test_the_window_doubles_up_to_400_and_shrinks_at_a_step_change() -> None:
    rng = np.random.default_rng(8)
    window = NoiseScaleWindow(None)
    before = [reading.window for reading in _observe(window, _noisy(rng, 600, 100, 1.0))]
    assert before[:25] == list(range(1, 26))
    assert set(before[24:]) == {25, 50, 100, 200, 400}
    ends = [_observe(NoiseScaleWindow(None), _noisy(rng, 400, 100, 1.0))[-1].window for _ in range(40)]
    assert ends.count(400) > 20  # where nothing changes, four tests by two standard errors let two in three pass
    after = _observe(window, _noisy(rng, 300, 100, 0.25))
    assert after[24].window == 25
    assert after[24].low < 400 < after[24].high
    assert all(reading.window < 1.2 * steps for steps, reading in enumerate(after[24:], start=25))  # little from before
    assert max(reading.window for reading in after[24:]) == 200


def _alternating(steps: int, trace: float, trace_swing: float, norm: float, norm_swing: float) -> Pairs:
    sign = (-1.0) ** np.arange(steps)[:, None]
    return np.asarray(np.array([trace, norm]) + sign * [trace_swing, norm_swing], dtype=np.float64)


@pytest.mark.parametrize(
    ("steps", "trace_swing", "norm_swing", "training_examples", "state"),
    [
        (24, 1.0, 0.1, 1472, "unresolved"),
        (25, 1.0, 0.1, 1472, "resolved"),
        (25, 1.0, 1.3, 1472, "wide"),
        (25, 1.0, 2.0, 1472, "lower_bound"),
        (25, 1.0, 2.0, None, "lower_bound"),
        (25, 1.0, 0.1, 50, "beyond_data"),
        (25, 1.0, 2.0, 20, "beyond_data"),
        (25, 300.0, 2.0, 1472, "unresolved"),  # no bound
        (25, 300.0, 0.1, 1472, "unresolved"),  # low end below 0
    ],
)
def test_states(steps: int, trace_swing: float, norm_swing: float, training_examples: int | None, state: str) -> None:
    reading = _observe(NoiseScaleWindow(training_examples), _alternating(steps, 100, trace_swing, 1, norm_swing))[-1]
    assert reading.state == state
    ends = (reading.low, reading.noise_scale, reading.high)
    if state == "unresolved":
        assert all(math.isnan(end) for end in ends)
    else:
        assert 0 <= ends[0] <= ends[1] <= ends[2]
    if state == "lower_bound":
        assert reading.high == math.inf
    assert (reading.high > 4 * reading.low) == (state in ("wide", "lower_bound") or training_examples == 20)
    assert (reading.steps_needed == 0) == (state == "resolved" or training_examples == 50)


@pytest.mark.parametrize(
    ("low", "high", "training_examples", "state"),
    [
        (math.nan, math.nan, math.inf, "unresolved"),
        (-1.0, 5.0, math.inf, "unresolved"),
        (0.0, 0.0, math.inf, "resolved"),
        (10.0, 40.0, math.inf, "resolved"),
        (10.0, 40.1, math.inf, "wide"),
        (10.0, math.inf, 10.0, "lower_bound"),
        (10.1, math.inf, 10.0, "beyond_data"),
    ],
)
def test_the_state_of_an_interval(low: float, high: float, training_examples: float, state: str) -> None:
    assert state_of(low, high, training_examples) == state


def test_a_negative_mean_gradient_norm_leaves_a_lower_bound_only() -> None:
    reading = _observe(NoiseScaleWindow(1472), _alternating(26, 100, 1.0, -0.05, 1.0))[-1]
    assert reading.squared_norm < 0
    assert (reading.state, reading.noise_scale, reading.high) == ("lower_bound", math.inf, math.inf)
    assert 0 < reading.low < 1472
    assert math.isnan(reading.steps_needed)


def test_norms_certainly_below_zero_are_no_reading() -> None:
    for trace, norm in ((100, -1.0), (-100, 1.0), (-100, -1.0), (-100, 0.001)):
        assert _observe(NoiseScaleWindow(None), _alternating(30, trace, 1.0, norm, 0.05))[-1].state == "unresolved"


def test_nothing_observed() -> None:
    reading = NoiseScaleWindow(1472).reading
    assert (reading.state, reading.observations, reading.window, reading.drifting) == ("unresolved", 0, 0, False)
    assert all(math.isnan(value) for value in (reading.noise_scale, reading.squared_norm, reading.variance_trace))


def test_steps_without_an_observation_change_nothing() -> None:
    window = NoiseScaleWindow(None)
    before = _observe(window, _noisy(np.random.default_rng(1), 30, 100, 1.0))[-1]
    for moments in (None, Moments(math.nan, 1.0), Moments(1.0, math.inf), Moments(math.inf, -math.inf)):
        assert window.observe(moments) is before
    assert window.reading is before


def test_a_trend_or_correlated_steps_are_flagged_and_plain_noise_rarely() -> None:
    rng = np.random.default_rng(3)
    noise = [_noisy(rng, 25, 100, 1.0) for _ in range(200)]
    trend = np.linspace(1.8, 0.2, 25)[:, None] * [0, 1.0] + [1.0, 0.0]
    assert np.mean([_observe(NoiseScaleWindow(None), pairs)[-1].drifting for pairs in noise]) < 0.1
    assert np.mean([_observe(NoiseScaleWindow(None), pairs * trend)[-1].drifting for pairs in noise[:50]]) > 0.9
    correlated = [
        (pairs[3:] + pairs[2:-1] + pairs[1:-2] + pairs[:-3]) / 4
        for pairs in map(np.vstack, zip(noise, noise, strict=True))
    ]
    assert np.mean([_observe(NoiseScaleWindow(None), pairs)[-1].drifting for pairs in correlated]) > 0.5


def test_the_planner_keeps_its_word() -> None:
    """What it asks for makes high/low 4 where the trace is known well: (1 + q)/(1 - q) at q = z sqrt(v/n)."""
    n = 50
    means = PairedMeans(100.0, 1.0, 0.0, 0.2, 0.0)
    total = n + steps_needed(means, n)
    q = 1.96 * math.sqrt(n * 0.2 / total)
    assert (1 + q) / (1 - q) == pytest.approx(4, rel=0.02)
    assert total == pytest.approx(10.7 * n * 0.2, rel=0.03)
    assert steps_needed(PairedMeans(100.0, 1.0, 0.0, 0.9, 0.0), n) == math.inf  # 480, above the largest window
    assert math.isnan(steps_needed(PairedMeans(100.0, -1.0, 0.0, 0.1, 0.0), n))
    assert math.isnan(steps_needed(means, 24))


@pytest.mark.parametrize(("counts", "finite", "within_four"), [((16, 16), 681, 1897), ((8, 8, 8, 8), 461, 1284)])
def test_the_planner_agrees_with_simulated_windows(counts: tuple[int, ...], finite: int, within_four: int) -> None:
    """B/b = 30 and (tr Sigma)^2 / tr Sigma^2 = 21: half of the windows of the planned length are where they should be.

    v = B^2 V(|G|^2) with V = 4 |G|^2 / 21 b + 2 R / (R - 1) / 21 b^2 for R equal units and tr(Sigma) = 1.
    """
    units, batch = len(counts), sum(counts)
    v = (30 * batch) ** 2 * (4 / (30 * batch * batch) + 2 * units / ((units - 1) * batch**2)) / 21
    assert (math.ceil(3.84 * v), math.ceil(10.7 * v)) == pytest.approx((finite, within_four), abs=3)
    for size, share_of in ((finite, _has_an_end), (within_four, _is_within_four)):
        noise = gaussian(np.random.default_rng([size, units]), (300, size), FLAT, counts)
        traces, norms = noise.moments(np.full(size, 1 / (30 * batch)))
        t = t_quantile(0.95, 2 * (size - 1) / 3)
        shares = [share_of(*fieller(_means(np.stack(pair, axis=1)), t)) for pair in zip(traces, norms, strict=True)]
        assert 0.35 < np.mean(shares) < 0.65


def _has_an_end(_: float, high: float) -> bool:
    return high < math.inf


def _is_within_four(low: float, high: float) -> bool:
    return high <= 4 * low


def _means(pairs: Pairs) -> PairedMeans:
    covariance = _covariance_of_means(pairs)
    x, y = pairs.mean(axis=0)
    return PairedMeans(float(x), float(y), *(float(covariance[i]) for i in ((0, 0), (1, 1), (0, 1))))


@pytest.mark.parametrize("observed", [0, 7, 25, 130, 1590, 1700])
def test_a_loaded_state_goes_on_bit_for_bit(observed: int) -> None:
    pairs = _noisy(np.random.default_rng(9), observed + 300, 100 / 3, 0.1, spread=0.5)
    window = NoiseScaleWindow(1472)
    _observe(window, pairs[:observed])
    state = json.loads(json.dumps(window.state_dict()))
    loaded = NoiseScaleWindow(1472)
    _observe(loaded, pairs[:3])  # what it held before is gone
    loaded.load_state_dict(state)
    assert repr(loaded.reading) == repr(window.reading)
    assert repr(_observe(loaded, pairs[observed:])) == repr(_observe(window, pairs[observed:]))
    assert loaded.state_dict() == window.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"observations": 2, "variance_trace": [1.0, 2.0]},
        {"observations": 3, "variance_trace": [1.0, 2.0], "squared_norm": [1.0, 2.0]},
        {"observations": 2, "variance_trace": [1.0, 2.0], "squared_norm": [1.0]},
        {"observations": 1, "variance_trace": ["one"], "squared_norm": [1.0]},
        {"observations": 1, "variance_trace": [None], "squared_norm": [1.0]},
        {"observations": 1, "variance_trace": [1.0], "squared_norm": [math.inf]},
        {"observations": "many", "variance_trace": [], "squared_norm": []},
    ],
)
def test_a_broken_state_is_refused(state: dict[str, object]) -> None:
    window = NoiseScaleWindow(None)
    before = _observe(window, _noisy(np.random.default_rng(1), 30, 100, 1.0))[-1]
    with pytest.raises(CheckpointError, match="noise scale state"):
        window.load_state_dict(state)
    assert window.reading is before


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40, 1e-9, 3e7])
def test_gradients_times_c_leave_the_noise_scale(factor: float) -> None:
    pairs = _noisy(np.random.default_rng(7), 230, 100, 1.0, spread=0.6)
    for plain, scaled in zip(
        _observe(NoiseScaleWindow(1472), pairs), _observe(NoiseScaleWindow(1472), factor * pairs), strict=True
    ):
        assert (scaled.state, scaled.window, scaled.drifting) == (plain.state, plain.window, plain.drifting)
        assert [scaled.noise_scale, scaled.low, scaled.high, scaled.steps_needed] == pytest.approx(
            [plain.noise_scale, plain.low, plain.high, plain.steps_needed], rel=1e-9, nan_ok=True
        )


def test_an_outlier_long_gone_leaves_no_trace() -> None:
    """Running sums would keep the rounding error of the largest value they ever held."""
    pairs = _noisy(np.random.default_rng(10), 500, 100, 1.0)
    clean = _observe(NoiseScaleWindow(None), pairs)[-1]
    window = NoiseScaleWindow(None)
    window.observe(Moments(1e20, -1e20))
    later = _observe(window, pairs)[-1]
    assert (later.low, later.noise_scale, later.high) == (clean.low, clean.noise_scale, clean.high)
