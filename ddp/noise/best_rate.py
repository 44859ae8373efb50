"""Steps at each batch size's best learning rate, and the bootstrap over seeds that repeats the choice.

The best of several noisy means is partly luck, so the choice is smoothed by a parabola in log learning rate, and the
bootstrap makes it anew in every draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import NormalDist

import numpy as np

from ddp.noise.estimate import Estimate, exp
from ddp.noise.hyperbola import Array

DRAWS = 1_000
SAME = math.log(1.001)  # learning rates this near each other are one, whose runs belong together
CLOSE = math.log(1.03)  # one this near the best says nothing of the valley's shape: its chance is as large as the slope
NEAR = math.log(2) + 1e-6  # learning rates within this factor of the best take part in its parabola,
ALIKE = math.log(1.3)  # if they need at most this factor more steps: further up the valley is no parabola


@dataclass(frozen=True, slots=True)
class Cell:
    """Runs alike but for their seed.

    Attributes:
        batch_size: examples a step.
        learning_rate: of all of its runs.
        steps: to the target, one a run; NaN where a run diverged or did not reach it.
    """

    batch_size: float
    learning_rate: float
    steps: tuple[float, ...]

    @property
    def reached(self) -> bool:
        """Whether every run did: a learning rate that fails on some seeds is none to train with."""
        return bool(self.steps) and all(math.isfinite(steps) and steps > 0 for steps in self.steps)


@dataclass(frozen=True)
class DrawnBest:
    """One batch size at its best learning rate, in the runs as they are (row 0) and in each draw of the bootstrap.

    Attributes:
        log_steps, log_rate: shape (1 + draws,).
        grid_rate, interior, seeds: as in `BestRate`, of the runs as they are.
    """

    batch_size: float
    log_steps: Array
    log_rate: Array
    grid_rate: float
    interior: bool
    seeds: int


def bootstrap_best(cells: Iterable[Cell], draws: int = DRAWS, seed: int = 0) -> list[DrawnBest]:
    """The batch sizes at which some learning rate reached the target, ascending, each with its best over all draws."""
    generator = np.random.default_rng(seed)
    ordered = sorted(cells, key=lambda cell: (cell.batch_size, cell.learning_rate))
    by_size = [_merged(group) for _, group in groupby(ordered, key=lambda cell: cell.batch_size)]
    return [_drawn_best(group, draws, generator) for group in by_size if any(cell.reached for cell in group)]


def _merged(cells: Iterable[Cell]) -> list[Cell]:
    """Those of one batch size, by learning rate; ones that differ by rounding are one, at the lowest of their rates."""
    merged: list[Cell] = []
    for cell in cells:
        if merged and is_same_rate(cell.learning_rate, merged[-1].learning_rate):
            merged[-1] = replace(merged[-1], steps=merged[-1].steps + cell.steps)
        else:
            merged.append(cell)
    return merged


def is_same_rate(one: float, other: float) -> bool:
    """Whether two learning rates differ by rounding at most."""
    return abs(math.log(one / other)) <= SAME


def _drawn_best(cells: Sequence[Cell], draws: int, generator: np.random.Generator) -> DrawnBest:
    log_rates = np.log([cell.learning_rate for cell in cells])
    log_steps = _draw_means(cells, draws, generator)
    chosen, log_rate, least = valley_minimum(log_rates, log_steps)
    first = int(chosen[0])
    interior = 0 < first < len(cells) - 1
    best = cells[first]
    return DrawnBest(best.batch_size, least, log_rate, best.learning_rate, interior, len(best.steps))


def _draw_means(cells: Sequence[Cell], draws: int, generator: np.random.Generator) -> Array:
    """Mean log steps of each cell, shape (1 + draws, cells), infinite where it failed; row 0 is the runs' own.

    Deviations are scaled by sqrt(n/(n-1)): resampling n values shows only (n-1)/n of their mean's variance,
    two thirds with three seeds. A cell of a single run takes the deviations of the batch size's others.
    """
    means = np.full((1 + draws, len(cells)), math.inf)
    deviations = {index: _deviations(cell) for index, cell in enumerate(cells) if cell.reached}
    pooled = np.concatenate([each for each in deviations.values() if len(each) > 1] or [np.zeros(1)])
    for index, own in deviations.items():
        n = len(own)
        source = own if n > 1 else pooled
        means[:, index] = np.log(cells[index].steps).mean()
        means[1:, index] += source[generator.integers(len(source), size=(draws, n))].mean(axis=1)
    return means


def _deviations(cell: Cell) -> Array:
    logs = np.log(cell.steps)
    n = len(logs)
    return (logs - logs.mean()) * math.sqrt(n / max(n - 1, 1))


def valley_minimum(log_rates: Array, log_steps: Array) -> tuple[Array, Array, Array]:
    """The best learning rate of each row, smoothed by a parabola through its neighbours.

    A parabola in log learning rate through the points near the best averages over their runs, and so is less a
    matter of luck than the smallest of several noisy means. It is used where there are such points on both sides and
    it has its minimum among them, no further below the best than they lie above it at most. Near is in learning rate
    and in steps: on the way to divergence steps rise so steeply that one such point moved B_crit by up to 10 % in
    simulations. A point within CLOSE of the best takes no part: two at one place bend a parabola at will.

    Args:
        log_rates: shape (n,), ascending.
        log_steps: shape (m, n), infinite where a rate failed (in all rows alike).

    Returns:
        Index of the best, log learning rate and log steps at the minimum, each of shape (m,).
    """
    chosen = log_steps.argmin(axis=1)
    log_rate, least = log_rates[chosen], log_steps.min(axis=1)
    known = np.isfinite(log_steps[0])
    for index in np.unique(chosen):
        offsets = log_rates - log_rates[index]
        apart = (np.abs(offsets) >= CLOSE) | (offsets == 0)
        alike = log_steps[0] <= log_steps[0, index] + ALIKE
        near = known & alike & apart & (np.abs(offsets) <= NEAR)
        if not (near[:index].any() and near[index + 1 :].any()):
            continue
        rows = np.flatnonzero(chosen == index)
        offset, value = _vertex(offsets[near], log_steps[np.ix_(rows, np.flatnonzero(near))])
        good = np.isfinite(offset) & (value >= least[rows] - ALIKE)
        log_rate[rows[good]] = log_rates[index] + offset[good]
        least[rows[good]] = value[good]
    return chosen, log_rate, least


def _vertex(x: Array, y: Array) -> tuple[Array, Array]:
    """Minimum (place, value) of the parabola through each row of y; NaN where it has none within x."""
    curve = y @ np.linalg.pinv(np.stack([np.ones_like(x), x, x * x], axis=1)).T
    c, b, a = curve.T
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(a > 0, -b / (2 * a), math.nan)
        inside = (place >= x.min()) & (place <= x.max())
        return np.where(inside, place, math.nan), np.where(inside, c - b * b / (4 * a), math.nan)


def estimate(log_draws: Array, confidence: float) -> Estimate:
    """exp of row 0 of shape (1 + draws,), with the bias-corrected percentile interval of the other rows (Efron 1981)."""
    point, draws = float(log_draws[0]), np.sort(log_draws[1:])
    normal = NormalDist()
    below = (np.count_nonzero(draws < point) + 0.5 * np.count_nonzero(draws == point)) / len(draws)
    shift = normal.inv_cdf(min(max(below, 0.5 / len(draws)), 1 - 0.5 / len(draws)))
    z = normal.inv_cdf((1 + confidence) / 2)
    ends = [normal.cdf(2 * shift + sign * z) for sign in (-1, 1)]
    low, high = (float(np.quantile(draws, end)) for end in ends)
    return Estimate(exp(point), exp(min(low, point)), exp(max(high, point)))
