"""Ways to get a wrong noise scale, each done here naively beside what the window says: the window avoids them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ddp.noise.interval import PairedMeans, fieller, t_quantile
from ddp.noise.moments import Moments, unbiased_moments
from ddp.noise.noise_scale import LARGEST_WINDOW, NoiseScaleWindow, Reading
from noise_scale_populations import FLAT, gaussian

Floats = NDArray[np.float64]
TRUTH = 101.0  # linear regression, 20 inputs, noise 2, distance 1: D + 1 + D sigma^2


def _read(traces: Floats, norms: Floats) -> Reading:
    """What the window says after these observations."""
    window = NoiseScaleWindow(None)
    for trace, norm in zip(traces.tolist(), norms.tolist(), strict=True):
        window.observe(Moments(variance_trace=trace, squared_norm=norm))
    return window.reading


def _means(traces: Floats, norms: Floats) -> PairedMeans:
    """Means of all, with the covariance from first differences."""
    n = len(traces)
    differences = np.diff([traces, norms], axis=1)
    covariance = differences @ differences.T / (2 * n * (n - 1))
    x, y = float(traces.mean()), float(norms.mean())
    return PairedMeans(x, y, *(float(covariance[i]) for i in ((0, 0), (1, 1), (0, 1))))


def _fieller(traces: Floats, norms: Floats) -> tuple[float, float]:
    return fieller(_means(traces, norms), t_quantile(0.95, 2 * (len(traces) - 1) / 3))


@pytest.fixture(scope="module")
def regression() -> tuple[Floats, Floats]:
    """S and |G|^2 of 60 runs of 400 steps on two ranks of 8 examples, each shaped (60, 400)."""
    rng, runs, ranks, examples = np.random.default_rng(12), 60, 2, 8
    traces, norms = np.empty((runs, 400)), np.empty((runs, 400))
    for run in range(runs):
        inputs = rng.normal(size=(400, ranks, examples, 20))
        errors = inputs[..., 0] - 2 * rng.normal(size=(400, ranks, examples))
        units = (inputs * errors[..., None]).mean(axis=2)
        own, mean = np.square(units).sum(axis=2), np.square(units.mean(axis=1)).sum(axis=1)
        for step in range(400):
            moments = unbiased_moments(own[step], [examples] * ranks, float(mean[step]))
            assert moments is not None
            traces[run, step], norms[run, step] = moments.variance_trace, moments.squared_norm
    return traces, norms


def test_averages_first_and_ratio_last(regression: tuple[Floats, Floats]) -> None:
    """All other orders are off by half of the truth and more, and jump from run to run."""
    traces, norms = regression
    ratio_of_averages = traces.mean(axis=1) / norms.mean(axis=1)
    assert np.median(ratio_of_averages) == pytest.approx(TRUTH, rel=0.1)

    ratios = traces / norms
    averaged = ratios.mean(axis=1)
    assert abs(np.median(averaged) - TRUTH) > 60
    assert np.quantile(averaged, 0.95) - np.quantile(averaged, 0.05) > 2 * TRUTH
    assert np.median(ratios) < 0.5 * TRUTH

    positive = [pair[pair > 0].mean() for pair in ratios]  # ratios of steps with a negative |G|^2 dropped
    assert np.median(positive) > 1.5 * TRUTH
    assert np.max(positive) > 10 * TRUTH


def test_steps_are_neither_clamped_nor_dropped(regression: tuple[Floats, Floats]) -> None:
    """A step's honest |G|^2 is often negative; averages without those, or with zeros instead, are far too large."""
    traces, norms = regression
    assert 0.3 < np.mean(norms < 0) < 0.6
    clamped = traces.mean() / np.maximum(norms, 0).mean()
    dropped = traces[norms > 0].mean() / norms[norms > 0].mean()
    assert clamped < 0.6 * TRUTH
    assert dropped < 0.4 * TRUTH
    readings = [_read(*run) for run in zip(traces, norms, strict=True)]
    covered = [not (reading.low > TRUTH or reading.high < TRUTH) for reading in readings]
    assert np.mean(covered) > 0.85  # 0.95 less three standard errors
    ours = np.sum([r.variance_trace * r.window for r in readings]) / np.sum(
        [r.squared_norm * r.window for r in readings]
    )
    assert ours == pytest.approx(TRUTH, rel=0.1)


def test_consecutive_steps_are_no_units() -> None:
    """On a stationary quadratic the gradient of one step undoes the noise of the last: |G|^2 comes out negated.

    L = |theta|^2/2 at learning rate k, gradient noise of variance 1/b a coordinate: E|theta|^2 = D k/(b (2 - k)), so
    B = b (2 - k)/k, while E g_s . g_(s+1) = -E|G|^2, and S is too large by 2 b |G|^2.
    """
    rng, dimensions, rate, steps = np.random.default_rng(4), 20, 0.2, 12_000
    truth = 2 * (2 - rate) / rate  # two examples a step, one a rank
    theta, own, last = np.zeros(dimensions), [], np.zeros(dimensions)
    honest: list[tuple[float, float]] = []
    consecutive: list[tuple[float, float]] = []
    for step in range(steps):
        units = theta + rng.normal(size=(2, dimensions))
        mean = units.mean(axis=0)
        pairs = ((units, [1.0, 1.0], honest), (np.stack([last, mean]), [2.0, 2.0], consecutive))
        for own, counts, kept in pairs:
            moments = unbiased_moments((own**2).sum(axis=1), counts, float((own.mean(axis=0) ** 2).sum()))
            assert moments is not None
            if step > 100:
                kept.append((moments.variance_trace, moments.squared_norm))
        theta, last = theta - rate * mean, mean
    trace, norm = np.mean(honest, axis=0)
    assert trace / norm == pytest.approx(truth, rel=0.1)
    trace, norm = np.mean(consecutive, axis=0)
    assert trace / norm == pytest.approx(-(truth + 4), rel=0.1)
    readings = {name: _read(*np.array(kept[-400:]).T) for name, kept in (("ours", honest), ("naive", consecutive))}
    assert readings["ours"].low < truth < readings["ours"].high
    assert readings["naive"].squared_norm < 0


def test_sums_since_the_start_are_stale() -> None:
    """B grows from 50 to 300 within 184 steps, as over eight epochs of digits: tr(Sigma) stays, |G|^2 falls."""
    steps, runs, counts = 184, 40, (32, 32)
    noise_scales = 50 * 6 ** (np.arange(steps) / steps)
    traces, norms = gaussian(np.random.default_rng(6), (runs, steps), FLAT, counts).moments(1 / noise_scales)
    stale, recent, of_window, ratios = [], [], [], []
    for trace, norm in zip(traces, norms, strict=True):
        window = NoiseScaleWindow(None)
        for end in range(1, steps + 1):
            reading = window.observe(Moments(variance_trace=trace[end - 1], squared_norm=norm[end - 1]))
            if end < 60 or end % 4:
                continue
            low, high = _fieller(trace[:end], norm[:end])
            present = noise_scales[end - 1]
            target = 1 / (1 / noise_scales[end - reading.window : end]).mean()
            stale.append(low <= present <= high)
            recent.append(not (reading.low > present or reading.high < present))
            of_window.append(not (reading.low > target or reading.high < target))
        means = _means(trace, norm)
        ratios.append((means.x / means.y / present, reading.variance_trace / reading.squared_norm / present))
    assert np.mean(stale) < 0.2
    assert np.mean(recent) > 2.5 * np.mean(stale)
    assert np.mean(of_window) > 0.92
    since_start, ours = np.median(ratios, axis=0)
    assert since_start < 0.5
    assert ours > 0.6


def test_a_window_cut_short_by_chance_is_not_trusted_as_one_that_was_not() -> None:
    """Nothing changes, yet one window in three is cut short, just where its newest observations lie off."""
    runs, noise_scale, counts = 1200, 64, (32, 32)
    noise = gaussian(np.random.default_rng(9), (runs, LARGEST_WINDOW), FLAT, counts)
    traces, norms = noise.moments(np.full(LARGEST_WINDOW, 1 / noise_scale))
    naive, ours, cut_short = [], [], []
    for trace, norm in zip(traces, norms, strict=True):
        window = NoiseScaleWindow(None)
        window.load_state_dict({"observations": LARGEST_WINDOW, "variance_trace": trace, "squared_norm": norm})
        reading = window.reading
        low, high = _fieller(trace[-reading.window :], norm[-reading.window :])
        naive.append(low <= noise_scale <= high)
        ours.append(reading.low <= noise_scale <= reading.high)
        cut_short.append(reading.window < LARGEST_WINDOW)
    assert 0.2 < np.mean(cut_short) < 0.4
    assert np.mean(np.array(naive)[cut_short]) < 0.84
    assert np.mean(naive) < 0.915
    assert np.mean(ours) > 0.922


@pytest.mark.parametrize("ratio", [1 / 30, 0.3])
def test_a_symmetric_interval_is_far_too_narrow(ratio: float) -> None:
    """The delta method's, where |G|^2 is uncertain; ours says that there is no end instead."""
    size, runs, noise_scale = 25, 2000, 64 / ratio
    noise = gaussian(np.random.default_rng(2), (runs, size), FLAT, (32, 32))
    delta, ours = [], []
    for trace, norm in zip(*noise.moments(np.full(size, 1 / noise_scale)), strict=True):
        means, reading = _means(trace, norm), _read(trace, norm)
        value = means.x / means.y
        variance = means.variance_x - 2 * value * means.covariance + value**2 * means.variance_y
        delta.append(abs(value - noise_scale) <= 2.12 * math.sqrt(variance) / abs(means.y))
        ours.append(not (reading.low > noise_scale or reading.high < noise_scale))
    assert np.mean(delta) < (0.7 if ratio < 0.1 else 0.93)
    assert 0.935 < np.mean(ours) < 0.985
