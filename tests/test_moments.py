"""The estimator of one step against all steps there are: small data sets, enumerated draw by draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from ddp.noise.moments import Moments, unbiased_moments

LAYOUTS = [  # examples of each unit, weights (None: by examples)
    ((1, 1), None),
    ((2, 2), None),
    ((1, 3), None),
    ((2, 1), (0.2, 0.8)),
    ((2, 1, 1), None),
    ((1, 2, 1), (17.0, 5.0, 9.0)),  # tokens, not normalised
    ((1, 1, 1, 1), (0.4, 0.3, 0.2, 0.1)),
    ((1, 2, 1, 1), None),
]


def _data(examples: int) -> NDArray[np.float64]:
    """Per-example gradients, shape (examples, 3), skewed and with a mean that is not small."""
    return np.random.default_rng(examples).exponential(size=(examples, 3)) - [0.2, 1.5, 0.0]


def _moments(
    gradients: NDArray[np.float64],
    drawn: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[float] | None,
    population: float,
) -> Moments:
    """What ranks would hand in that drew these examples, rank by rank."""
    ends = np.cumsum(counts)
    units = np.array(
        [gradients[list(drawn[end - count : end])].mean(axis=0) for count, end in zip(counts, ends, strict=True)]
    )
    mean = np.average(units, axis=0, weights=counts if weights is None else weights)
    moments = unbiased_moments((units**2).sum(axis=1), counts, float(mean @ mean), weights, population)
    assert moments is not None
    return moments


def _average(all_moments: Iterable[Moments]) -> tuple[float, float]:
    pairs = [(moments.squared_norm, moments.variance_trace) for moments in all_moments]
    squared_norm, variance_trace = np.mean(pairs, axis=0)
    return float(squared_norm), float(variance_trace)


@pytest.mark.parametrize(("counts", "weights"), LAYOUTS)
def test_unbiased_over_all_draws_with_replacement(counts: tuple[int, ...], weights: tuple[float, ...] | None) -> None:
    gradients = _data(3)
    draws = itertools.product(range(3), repeat=sum(counts))
    average = _average(_moments(gradients, drawn, counts, weights, math.inf) for drawn in draws)
    mean = gradients.mean(axis=0)
    trace = ((gradients - mean) ** 2).sum() / 3
    assert average == pytest.approx((mean @ mean, trace), rel=1e-10)


@pytest.mark.parametrize("population", [5, 6])
@pytest.mark.parametrize(("counts", "weights"), LAYOUTS)
def test_unbiased_over_all_draws_without_replacement(
    counts: tuple[int, ...], weights: tuple[float, ...] | None, population: int
) -> None:
    gradients = _data(population)
    draws = itertools.permutations(range(population), sum(counts))
    average = _average(_moments(gradients, drawn, counts, weights, population) for drawn in draws)
    mean = gradients.mean(axis=0)
    trace = ((gradients - mean) ** 2).sum() / (population - 1)
    assert average == pytest.approx((mean @ mean, trace), rel=1e-10)


def test_draws_without_replacement_need_the_population() -> None:
    gradients = _data(6)
    draws = list(itertools.permutations(range(6), 4))
    mean = gradients.mean(axis=0)
    ignored, _ = _average(_moments(gradients, drawn, (2, 2), None, math.inf) for drawn in draws)
    assert ignored < 0.9 * (mean @ mean)


def test_two_equal_units_give_the_two_point_formula() -> None:
    small, big = 3.0, 1.75  # |g|^2 averaged over two units of 8 examples, and of all 16
    moments = unbiased_moments([2.5, 3.5], [8, 8], big)
    assert moments is not None
    assert moments.squared_norm == pytest.approx((16 * big - 8 * small) / (16 - 8))
    assert moments.variance_trace == pytest.approx((small - big) / (1 / 8 - 1 / 16))


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_order_of_the_units_does_not_matter(weights: list[float] | None) -> None:
    norms, counts = [4.0, 2.5, 7.0], [3, 5, 2]
    expected = unbiased_moments(norms, counts, 1.9, weights, 1472)
    assert expected is not None
    for order in itertools.permutations(range(3)):
        shuffled = [[each[i] for i in order] if each else None for each in (norms, counts, weights)]
        moments = unbiased_moments(shuffled[0] or [], shuffled[1] or [], 1.9, shuffled[2], 1472)
        assert moments is not None
        assert moments.squared_norm == pytest.approx(expected.squared_norm, rel=1e-12)
        assert moments.variance_trace == pytest.approx(expected.variance_trace, rel=1e-12)


def test_gradients_times_c_give_moments_times_c_squared() -> None:
    one = unbiased_moments([4.0, 2.5, 7.0], [3, 5, 2], 1.9)
    big = unbiased_moments([400.0, 250.0, 700.0], [3, 5, 2], 190.0)
    assert one is not None
    assert big is not None
    assert big.squared_norm == pytest.approx(100 * one.squared_norm, rel=1e-12)
    assert big.variance_trace == pytest.approx(100 * one.variance_trace, rel=1e-12)


def test_units_without_examples_leave_all_sums() -> None:
    expected = unbiased_moments([4.0, 2.5], [3, 5], 1.9)
    assert unbiased_moments([4.0, 0.0, 2.5], [3, 0, 5], 1.9) == expected
    assert unbiased_moments([0.0, 4.0, 2.5], [0, 3, 5], 1.9, weights=[0.0, 3.0, 5.0]) == expected


def test_an_empty_unit_that_held_weight_only_shrank_the_mean() -> None:
    own = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]])
    norms = (own**2).sum(axis=1)
    thirds, halves = own.sum(axis=0) / 3, own.sum(axis=0) / 2
    with_it = unbiased_moments(norms, [4, 4, 0], float(thirds @ thirds), weights=[1 / 3] * 3)
    without = unbiased_moments(norms[:2], [4, 4], float(halves @ halves), weights=[0.5, 0.5])
    assert with_it is not None
    assert without is not None
    assert with_it.squared_norm == pytest.approx(without.squared_norm)
    assert with_it.variance_trace == pytest.approx(without.variance_trace)


@pytest.mark.parametrize(
    ("norms", "counts", "mean", "weights"),
    [
        ([], [], 0.0, None),
        ([1.0], [8], 1.0, None),
        ([1.0, 0.0], [8, 0], 1.0, None),
        ([1.0, 2.0], [8, 8], 1.0, [1.0, 0.0]),
        ([1.0, math.nan], [8, 8], 1.0, None),
        ([1.0, math.inf], [8, 8], 1.0, None),
        ([1.0, 2.0], [8, 8], math.nan, None),
        ([1.0, 2.0], [8, 8], math.inf, None),
        ([1.0, 2.0], [8, math.nan], 1.0, None),
    ],
)
def test_no_observation(norms: list[float], counts: list[float], mean: float, weights: list[float] | None) -> None:
    assert unbiased_moments(norms, counts, mean, weights) is None


def test_an_honest_estimate_may_be_negative() -> None:
    moments = unbiased_moments([4.0, 4.0], [1, 1], 0.1)
    assert moments is not None
    assert moments.squared_norm < 0


@pytest.mark.parametrize(
    ("norms", "counts", "weights", "population", "message"),
    [
        ([1.0, 2.0], [8], None, math.inf, "2 squared norms, 1 example counts"),
        ([1.0, 2.0], [8, 8], [1.0], math.inf, "1 weights"),
        ([1.0, 2.0], [8, -1], None, math.inf, "negative"),
        ([1.0, 2.0], [8, 8], [0.5, -0.5], math.inf, "negative"),
        ([1.0, 2.0], [8, 8], None, 15, "16 examples without replacement out of 15"),
    ],
)
def test_faulty_calls_are_told(
    norms: list[float], counts: list[float], weights: list[float] | None, population: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unbiased_moments(norms, counts, 1.0, weights, population)
