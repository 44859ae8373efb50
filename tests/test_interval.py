"""Fieller's interval against its definition on a grid and by simulated coverage; the t-quantile against scipy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ddp.noise.interval import PairedMeans, fieller, ratio_interval, t_quantile
from ddp.noise.moments import unbiased_moments
from noise_scale_populations import FLAT, heavy_tailed

REPETITIONS = 400
DIMENSIONS = 21  # (tr Sigma)^2 / tr Sigma^2 as measured on digits


def _steps(rng: np.random.Generator, steps: int, noise_scale: float, batch: int) -> NDArray[np.float64]:
    """tr(Sigma) and |G|^2 estimates of steps on two ranks, shape (steps, 2); true values 1 and 1/noise_scale."""
    gradients = rng.normal(size=(steps, 2, DIMENSIONS)) * math.sqrt(2 / batch / DIMENSIONS)
    gradients[:, :, 0] += math.sqrt(1 / noise_scale)
    own, mean = (gradients**2).sum(axis=2), (gradients.mean(axis=1) ** 2).sum(axis=1)
    pairs = []
    for own_squared_norms, mean_squared_norm in zip(own, mean, strict=True):
        moments = unbiased_moments(own_squared_norms, [batch / 2, batch / 2], float(mean_squared_norm))
        assert moments is not None
        pairs.append((moments.variance_trace, moments.squared_norm))
    return np.array(pairs)


def _means(pairs: NDArray[np.float64]) -> PairedMeans:
    """Means with their covariance from first differences, in numpy."""
    differences = np.diff(pairs, axis=0)
    covariance = differences.T @ differences / (2 * len(differences)) / len(pairs)
    x, y = pairs.mean(axis=0)
    return PairedMeans(float(x), float(y), *(float(covariance[i]) for i in ((0, 0), (1, 1), (0, 1))))


def _repeat(steps: int, noise_scale: float, batch: int) -> Iterator[PairedMeans]:
    rng = np.random.default_rng([steps, int(noise_scale), batch])
    pairs = _steps(rng, REPETITIONS * steps, noise_scale, batch)
    for start in range(0, len(pairs), steps):
        yield _means(pairs[start : start + steps])


def _delta_method(means: PairedMeans, t: float) -> tuple[float, float]:
    ratio = means.x / means.y
    variance = means.variance_x - 2 * ratio * means.covariance + ratio**2 * means.variance_y
    half = t * math.sqrt(variance) / abs(means.y)
    return ratio - half, ratio + half


@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize(("noise_scale", "batch"), [(21, 64), (192, 64), (1920, 64)])
def test_covers_as_often_as_it_says(steps: int, noise_scale: float, batch: int) -> None:
    t = t_quantile(0.95, 2 * (steps - 1) / 3)
    intervals = [fieller(means, t) for means in _repeat(steps, noise_scale, batch)]
    coverage = np.mean([not (low > noise_scale or high < noise_scale) for low, high in intervals])
    binomial_error = math.sqrt(0.95 * 0.05 / REPETITIONS)
    assert abs(coverage - 0.95) < 0.01 + 3 * binomial_error


def test_covers_where_the_delta_method_fails() -> None:
    steps, noise_scale = 25, 1920
    t = t_quantile(0.95, 2 * (steps - 1) / 3)
    repetitions = list(_repeat(steps, noise_scale, 64))
    delta = np.mean([low <= noise_scale <= high for low, high in (_delta_method(means, t) for means in repetitions)])
    ours = np.mean(
        [not (low > noise_scale or high < noise_scale) for low, high in (fieller(m, t) for m in repetitions)]
    )
    assert delta < 0.85
    assert ours > 0.91


def _random_means(rng: np.random.Generator) -> PairedMeans:
    """Means of either sign, from certain to hopeless."""
    x, y = rng.normal(1.0, 1.5, size=2)
    spread = rng.normal(size=(2, 2)) * 10 ** rng.uniform(-2, 0.3)
    covariance = spread @ spread.T
    return PairedMeans(float(x), float(y), *(float(covariance[i]) for i in ((0, 0), (1, 1), (0, 1))))


def test_agrees_with_its_definition_on_a_grid() -> None:
    """Every case of the docstring: which ratios from 0 to 1e6 do the means not contradict?"""
    rng = np.random.default_rng(5)
    ratios = np.concatenate([[0.0], np.logspace(-6, 6, 4001)])
    seen = {"interval": 0, "low end below 0": 0, "lower bound": 0, "no bound": 0, "contradiction": 0}
    for _ in range(1500):
        means, t = _random_means(rng), 2.0
        variance = means.variance_x - 2 * ratios * means.covariance + ratios**2 * means.variance_y
        allowed = (means.x - ratios * means.y) ** 2 <= t**2 * variance
        low, high = fieller(means, t)
        y_certain, x_certain = means.y**2 > t**2 * means.variance_y, means.x**2 > t**2 * means.variance_x
        if (y_certain and means.y < 0) or (not y_certain and x_certain and means.x < 0):
            seen["contradiction"] += 1
            assert math.isnan(low)
            assert math.isnan(high)
        elif not y_certain and not x_certain:
            seen["no bound"] += 1
            assert math.isnan(low)
            assert allowed[0]
            assert allowed[-1]
        else:
            kind = "lower bound" if not y_certain else "interval" if low > 0 else "low end below 0"
            seen[kind] += 1
            assert (high == math.inf) == (kind == "lower bound")
            inside = (ratios >= low) & (ratios <= high)
            near = np.isclose(ratios, low, rtol=1e-6) | np.isclose(ratios, high, rtol=1e-6)
            np.testing.assert_array_equal(inside[~near], allowed[~near])
    assert min(seen.values()) >= 30, seen


def test_ends_are_the_roots_of_the_quadratic() -> None:
    means, t = PairedMeans(101.0, 1.0, 9.0, 0.03, -0.1), 2.1
    a, b, c = 1 - t**2 * 0.03, 101 + t**2 * 0.1, 101**2 - t**2 * 9
    assert fieller(means, t) == pytest.approx(sorted(np.roots([a, -2 * b, c]).real), rel=1e-10)


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        (PairedMeans(6.0, 2.0, 0.0, 0.0, 0.0), (3.0, 3.0)),  # no noise at all
        (PairedMeans(0.0, 2.0, 0.0, 0.0, 0.0), (0.0, 0.0)),  # all examples alike
        (PairedMeans(6.0, 0.0, 0.0, 0.0, 0.0), (math.inf, math.inf)),  # no gradient at all
        (PairedMeans(0.0, 0.0, 0.0, 0.0, 0.0), (math.nan, math.nan)),
        (PairedMeans(math.inf, 1.0, 1.0, 1.0, 0.0), (math.nan, math.nan)),
        (PairedMeans(1.0, 1.0, math.nan, 1.0, 0.0), (math.nan, math.nan)),
    ],
)
def test_degenerate_means(means: PairedMeans, expected: tuple[float, float]) -> None:
    assert fieller(means, 2.0) == pytest.approx(expected, nan_ok=True)
    assert ratio_interval(means, 2.0) == pytest.approx(expected, nan_ok=True)


def test_the_high_end_is_corrected_for_skewness_and_nothing_else() -> None:
    rng, t = np.random.default_rng(6), 2.0
    moved = 0
    for _ in range(500):
        means = _random_means(rng)
        (low, high), (plain_low, plain_high) = ratio_interval(means, t), fieller(means, t)
        assert repr(low) == repr(plain_low)
        if not (plain_high < math.inf and means.x > 0):
            assert repr(high) == repr(plain_high)
            continue
        factor = 1 + t * math.sqrt(means.variance_x) / means.x
        a = means.y**2 - t**2 * means.variance_y
        b = means.x * means.y - t**2 * factor * means.covariance
        c = means.x**2 - t**2 * factor**2 * means.variance_x
        assert high == pytest.approx(max(plain_high, *np.roots([a, -2 * b, c]).real), rel=1e-6)
        moved += high > 1.01 * plain_high
    assert moved > 50


def test_covers_where_gradients_are_skewed() -> None:
    """Lognormal gradients on four uneven units at three times the noise scale, where Fieller's high end is too low."""
    steps, windows, noise_scale = 25, 3000, 32 / 3
    noise = heavy_tailed(np.random.default_rng(3), (windows, steps), FLAT, (14, 9, 6, 3), "lognormal 1")
    pairs = np.stack(noise.moments(np.full(steps, 1 / noise_scale)), axis=2)
    means, t = [_means(window) for window in pairs], t_quantile(0.95, 2 * (steps - 1) / 3)
    plain, corrected = ([end(m, t) for m in means] for end in (fieller, ratio_interval))
    assert np.mean([high < noise_scale for _, high in plain]) > 0.06
    assert np.mean([low > noise_scale or high < noise_scale for low, high in plain]) > 0.07
    assert np.mean([low > noise_scale or high < noise_scale for low, high in corrected]) < 0.07


@pytest.mark.parametrize("degrees", [1, 1.5, 2, 5, 16, 98 / 3, 66, 398 / 3, 266, 1e4])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99, 0.9999])
def test_t_quantile_agrees_with_scipy(confidence: float, degrees: float) -> None:
    assert t_quantile(confidence, degrees) == pytest.approx(stats.t.isf((1 - confidence) / 2, degrees), rel=1e-10)


@pytest.mark.parametrize(("degrees", "printed"), [(1, 12.706), (5, 2.571), (16, 2.120), (30, 2.042), (120, 1.980)])
def test_t_quantile_agrees_with_printed_tables(degrees: float, printed: float) -> None:
    assert round(t_quantile(0.95, degrees), 3) == printed


@pytest.mark.parametrize(("confidence", "degrees"), [(0.0, 5), (1.0, 5), (0.95, 0), (0.95, math.inf), (math.nan, 5)])
def test_t_quantile_refuses_what_has_none(confidence: float, degrees: float) -> None:
    with pytest.raises(ValueError, match="no t-quantile"):
        t_quantile(confidence, degrees)
