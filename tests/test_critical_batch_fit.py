"""The critical batch size from simulated runs whose answer is known: its value, its interval, and when there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from ddp.noise.best_rate import Cell, DrawnBest, bootstrap_best, estimate, valley_minimum
from ddp.noise.critical_batch import CriticalBatch, critical_batch
from ddp.noise.harmless_batch import HarmlessBatch, _compare, largest_harmless_batch
from ddp.noise.hyperbola import fit_curve, log_curve

S_MIN = 80.0
SIZES = tuple(2.0**power for power in range(2, 11))


def quadratic_valley(ratio: float) -> float:
    """Steps over the fewest, at `ratio` times the best learning rate, on a quadratic loss; diverges at 2."""
    return 1 / (2 * ratio - ratio**2) if ratio < 1.9 else math.nan


def even_valley(ratio: float) -> float:
    return math.exp(0.5 * math.log(ratio) ** 2)


def simulate(
    seed: int,
    *,
    critical: float = 60.0,
    noise: float = 0.1,
    exponent: float = 1.0,
    sizes: Sequence[float] = SIZES,
    valley: Callable[[float], float] = quadratic_valley,
    span: tuple[float, float] = (0.22, 4.5),
    seeds: int = 3,
) -> list[Cell]:
    """Log-normal steps over a grid of learning rates that knows nothing of the best, S_MIN (1 + (B_crit/B)^exponent)."""
    generator = np.random.default_rng(seed)
    cells: list[Cell] = []
    for size in sizes:
        best_rate = 0.5 / (1 + critical / size)
        grid = 1.13 * 2.0 ** np.arange(-12, 4, 0.5)
        for rate in grid[(grid > span[0] * best_rate) & (grid < span[1] * best_rate)]:
            steps = S_MIN * (1 + (critical / size) ** exponent) * valley(rate / best_rate)
            noisy = steps * np.exp(noise * generator.standard_normal(seeds))
            cells.append(Cell(size, float(rate), tuple(noisy.tolist())))
    return cells


def fits(count: int, **settings: object) -> list[CriticalBatch]:
    return [critical_batch(simulate(seed, **settings), draws=200, seed=seed) for seed in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.05, 0.2])
@pytest.mark.parametrize("valley", [quadratic_valley, even_valley])
def test_value_and_interval(noise: float, valley: Callable[[float], float]) -> None:
    """Within 3 % in the mean; 95 % intervals hold the truth in 90 to 99 % of 100 simulations, and are no wider than it takes."""
    found = [each.critical_batch_size for each in fits(100, noise=noise, valley=valley)]
    known = [each for each in found if each is not None]
    assert len(known) >= 98
    assert math.exp(np.mean([math.log(each.value) for each in known])) == pytest.approx(60, rel=0.03)
    held = np.mean([each.low <= 60 <= each.high for each in known])
    assert 0.90 <= held <= 0.99
    errors = np.std([math.log(each.value) for each in known])
    widths = np.median([math.log(each.high / each.low) for each in known])
    assert widths < 1.6 * 2 * 1.96 * errors


def test_both_ends_and_the_exponent() -> None:
    found = fits(40)
    steps = [each.smallest_steps.value for each in found if each.smallest_steps]
    examples = [each.smallest_examples.value for each in found if each.smallest_examples]
    assert np.mean(steps) == pytest.approx(S_MIN, rel=0.03)
    assert np.mean(examples) == pytest.approx(S_MIN * 60, rel=0.04)
    assert np.mean([each.exponent.value for each in found if each.exponent]) == pytest.approx(1, abs=0.03)
    assert sum(each.hyperbola_holds is True for each in found) >= 34


@pytest.mark.parametrize("exponent", [0.6, 1.6])
def test_another_exponent_is_noticed(exponent: float) -> None:
    found = fits(20, exponent=exponent)
    assert sum(each.hyperbola_holds is False for each in found) >= 19
    assert np.mean([each.exponent.value for each in found if each.exponent]) == pytest.approx(exponent, rel=0.06)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"critical": 3.0}, "below the bend: smaller ones are needed"),
        ({"critical": 2_000.0}, "above the bend: larger ones are needed"),
        ({"sizes": SIZES[:4]}, "only 4 batch sizes reached the target; it takes 5"),
        ({"span": (0.22, 1.05)}, "on the edge of those tried"),
        ({"span": (1.1, 4.5)}, "on the edge of those tried"),
    ],
)
def test_what_is_not_bracketed_has_no_value(settings: dict[str, object], words: str) -> None:
    """The very words say what to add; and S_min and E_min go with the value."""
    for each in fits(3, **settings):
        assert each.critical_batch_size is each.smallest_steps is each.smallest_examples is None
        assert words in each.reason


def test_an_interval_beyond_the_grid_gives_no_value() -> None:
    found = fits(12, critical=12.0, sizes=SIZES[:6], noise=0.8)
    beyond = [each for each in found if "the interval goes beyond the batch sizes that count, 4 to 128" in each.reason]
    assert beyond
    for each in found:
        if each.critical_batch_size is not None:
            assert 4 <= each.critical_batch_size.low <= each.critical_batch_size.high <= 128


def test_one_batch_size_on_the_edge_does_not_count() -> None:
    """At 64 only rates from 1.3 times the best up were tried: 60 % too many steps there, and no part in the fit."""
    cells = [cell for cell in simulate(0, noise=0.02) if cell.batch_size != 64]
    cells += simulate(1, noise=0.02, sizes=(64.0,), span=(1.3, 4.5))
    found = critical_batch(cells)
    assert [best.interior for best in found.best] == [True] * 4 + [False] + [True] * 4
    assert found.critical_batch_size is not None
    assert found.critical_batch_size.value == pytest.approx(60, rel=0.05)


def test_a_rate_that_fails_on_a_seed_is_not_the_best() -> None:
    cells = [Cell(8, 0.1, (50.0, 52.0)), Cell(8, 0.2, (30.0, math.nan)), Cell(8, 0.05, (80.0, 82.0))]
    (best,) = bootstrap_best(cells, draws=10)
    assert (best.grid_rate, best.interior) == (0.1, True)
    assert bootstrap_best([Cell(8, 0.1, (math.nan,))]) == []


def test_the_bootstrap_has_the_variance_of_the_mean() -> None:
    """Three seeds, resampled as they are, would show two thirds of it; one seed takes its neighbours' deviations."""
    logs = np.log([90.0, 100.0, 117.0])
    cells = [Cell(8, 0.1, tuple(np.exp(logs))), Cell(8, 0.4, (math.nan,)), Cell(16, 0.1, (300.0, 310.0))]
    drawn = bootstrap_best(cells, draws=40_000)[0].log_steps[1:]
    assert drawn.std() == pytest.approx(logs.std(ddof=1) / math.sqrt(3), rel=0.02)
    single = [*cells, Cell(8, 0.05, (20.0,))]
    drawn = bootstrap_best(single, draws=40_000)[0].log_steps[1:]
    assert drawn.std() == pytest.approx(logs.std(ddof=1), rel=0.02)


def test_the_valley_of_a_parabola() -> None:
    rates = np.log([0.05, 0.1, 0.2, 0.4, 0.8])
    truth = math.log(0.23)
    exact = 4 + 0.3 * (rates - truth) ** 2
    one_sided = np.where(rates > math.log(0.3), math.inf, exact)
    chosen, rate, least = valley_minimum(rates, np.stack([exact, exact + 1]))
    assert (chosen == 2).all()
    assert rate == pytest.approx(truth)
    assert least == pytest.approx([4, 5])
    chosen, rate, least = valley_minimum(rates, one_sided[None])
    assert (chosen[0], rate[0], least[0]) == (2, rates[2], exact[2])


@pytest.mark.parametrize("apart", [1e-9, 1e-4, 2e-3, 0.02])
def test_two_learning_rates_at_one_place_bend_nothing(apart: float) -> None:
    """The best, and one beside it whose runs differ by chance: with a third point a parabola has its bottom anywhere."""
    generator = np.random.default_rng(0)
    tried = ((0.08 * (1 - apart), 1.03), (0.08, 1.0), (0.08 * math.sqrt(2), 1.1), (0.16, 1.5))
    cells = [
        Cell(size, rate, tuple(factor * steps * np.exp(0.02 * generator.standard_normal(3))))
        for size, steps in ((4.0, 1000.0), (8.0, 520.0), (16.0, 280.0))
        for rate, factor in tried
    ]
    for best, steps in zip(bootstrap_best(cells), (1000, 520, 280), strict=True):
        assert abs(best.log_steps - math.log(steps)).max() < 0.1
        assert abs(best.log_rate - math.log(0.08)).max() < 0.4
    verdicts = [each.verdict for each in harmless(cells, need_interior=False).comparisons]
    assert verdicts == ["equivalent", "equivalent"]


def test_a_parabola_far_below_its_points_is_not_used() -> None:
    """Through a point far off and a near one that is much higher: its bottom would be half the steps of the best."""
    rates, steps = np.log([0.1, 0.199, 0.2, 0.21]), np.log([100.5, 100.0, 99.0, 128.0])
    chosen, rate, least = valley_minimum(rates, steps[None])
    assert (chosen[0], rate[0], least[0]) == (2, rates[2], steps[2])


def test_an_end_beyond_all_numbers_is_infinite() -> None:
    wide = estimate(np.array([1.0, *np.linspace(-2_000, 2_000, 400)]), 0.95)
    assert (wide.value, wide.low, wide.high) == (math.e, 0.0, math.inf)
    wild = [DrawnBest(size, np.array([5.0, *draws]), np.zeros(5), 0.1, True, 3) for size, draws in WILD]
    compared = _compare(*wild, margin=1.25, significance=0.05)
    assert (compared.verdict, compared.low, compared.high) == ("undecided", 0.0, math.inf)


WILD = ((4.0, (5.0, 5.0, 5.0, 5.0)), (8.0, (5.0, 1e4, -1e4, 5.0)))


@pytest.mark.parametrize("free", [False, True])
def test_the_fit_against_scipy(free: bool) -> None:
    """Without outliers Huber's weights are 1 for most points; compared with a general optimiser of the same loss."""
    generator = np.random.default_rng(3)
    x = np.log([4.0, 8, 16, 64, 128, 512, 1024])
    y = log_curve(x, math.log(70), math.log(40), 0.8) + 1e-6 * generator.standard_normal((4, 7))
    found = fit_curve(x, y.reshape(2, 2, 7), free_exponent=free)
    for row, u, v, alpha in zip(
        y,
        found.log_smallest_steps.ravel(),
        found.log_critical_batch_size.ravel(),
        found.exponent.ravel(),
        strict=True,
    ):
        if free:
            reference = least_squares(lambda p, row=row: row - log_curve(x, *p), (4.0, 4.0, 1.0)).x
            assert (u, v, alpha) == pytest.approx(tuple(reference), abs=1e-4)
            continue
        residuals = row - log_curve(x, u, v)
        scale = 1.4826 * np.median(np.abs(residuals)) * math.sqrt(7 / 5)
        reference = least_squares(
            lambda p, row=row: row - log_curve(x, *p), (4.0, 4.0), loss="huber", f_scale=1.345 * scale
        ).x
        assert (u, v) == pytest.approx(tuple(reference), abs=1e-3)


def test_one_outlier_does_not_carry_the_fit_away() -> None:
    x = np.log(SIZES)
    y = log_curve(x, math.log(80), math.log(60)) + 0.01 * np.random.default_rng(0).standard_normal(9)
    y[7] += 0.8
    assert math.exp(fit_curve(x, y).log_critical_batch_size) == pytest.approx(60, rel=0.06)


def test_a_flat_curve_has_no_bend() -> None:
    """Every batch size takes as many steps: B_crit runs to the edge of what is searched, and is refused."""
    cells = [Cell(size, rate, (steps, 1.02 * steps)) for size in SIZES for rate, steps in RATES_AND_STEPS]
    assert "smaller ones are needed" in critical_batch(cells, draws=50).reason


RATES_AND_STEPS = ((0.1, 120.0), (0.2, 100.0), (0.4, 130.0))


# --- the largest batch that does no harm ----------------------------------------------------------------------------


def harmless(cells: Sequence[Cell], **options: Any) -> HarmlessBatch:
    found = largest_harmless_batch(cells, **options)
    assert found is not None
    return found


def test_the_largest_harmless_batch() -> None:
    """Examples grow by 1 + B/60, so over those at 4 by 1.06, 1.19 (16), 1.44 (32): the limit of 1.25 lies after 16."""
    found = harmless(simulate(0, noise=0.01))
    assert (found.batch_size, found.at_least) == (16, False)
    ratios = [each.ratio for each in found.comparisons[:3]]
    assert ratios == pytest.approx([68 / 64, 76 / 64, 92 / 64], rel=0.04)
    assert [each.verdict for each in found.comparisons[:3]] == ["equivalent", "equivalent", "harmful"]


def test_a_wide_margin_or_noise() -> None:
    assert harmless(simulate(0, noise=0.01), margin=1e9).at_least
    noisy = harmless(simulate(0, noise=0.5))
    assert noisy.batch_size is None
    assert noisy.comparisons[0].verdict == "undecided"


def test_a_harmful_batch_is_called_harmless_in_five_percent() -> None:
    """At the margin itself, where the test is at its limit: 9 times as many examples in none, 1.25 in about 5 %."""
    rates = ((0.1, 1.3), (0.2, 1.0), (0.4, 1.3))
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        cells = [
            Cell(size, rate, tuple(factor * steps * np.exp(0.05 * generator.standard_normal(3))))
            for size, steps in ((4.0, 1000.0), (8.0, 625.0))
            for rate, factor in rates
        ]
        wrong += harmless(cells, draws=100).batch_size is not None
    assert 0.01 <= wrong / 400 <= 0.08


def test_a_smaller_need_of_examples_is_no_harm() -> None:
    cells = [
        Cell(size, rate, (factor * steps, 1.01 * factor * steps, 0.99 * factor * steps))
        for size, steps in ((4.0, 1000.0), (8.0, 300.0))
        for rate, factor in ((0.1, 1.3), (0.2, 1.0), (0.4, 1.3))
    ]
    found = harmless(cells)
    assert (found.batch_size, found.comparisons[0].verdict) == (8, "fewer")


def test_a_base_at_the_edge_of_its_learning_rates_takes_no_part() -> None:
    """The smallest batch wants a lower rate than was tried, and takes more examples than it has to: 8 is the base."""
    cells = simulate(0, noise=0.01)
    lowest = min(cell.learning_rate for cell in cells if cell.batch_size == 4)
    best = min((cell for cell in cells if cell.batch_size == 4), key=lambda cell: sum(cell.steps))
    cut = [cell for cell in cells if cell.batch_size > 4 or cell.learning_rate > 1.3 * best.learning_rate]
    assert lowest < best.learning_rate
    found = harmless(cut)
    assert found.base == 8 and all(each.batch_size > 8 for each in found.comparisons)
    assert found.batch_size == 16  # over those at 8 by 1.12 (16), 1.35 (32)
    counted = harmless(cut, need_interior=False)
    assert counted.base == 4 and counted.batch_size == 32  # which takes 1.44 times the examples of 4
    assert largest_harmless_batch([cell for cell in cells if cell.batch_size == 4]) is None
