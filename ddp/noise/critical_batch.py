"""The critical batch size from runs: numbers of steps in, a value with an interval out, or the reason why there is none.

Runs at several batch sizes, learning rates and seeds took so many steps to one training loss. At each batch size
the best learning rate is chosen, its steps are fitted by the hyperbola S = S_min + E_min/B (`hyperbola.py`), and
B_crit = E_min/S_min. The bootstrap draws seeds anew within each cell and repeats all of this, the choice of
the learning rate included. Where the grid does not bracket the value, none is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ddp.noise.best_rate import DRAWS, Cell, DrawnBest, bootstrap_best, estimate
from ddp.noise.estimate import Estimate
from ddp.noise.hyperbola import Array, CurveFit, fit_curve

FEWEST_BATCH_SIZES = 5
FEWEST_SEEDS = 2  # at the best learning rate of a batch size: one says nothing of chance
BRACKET = 2.0  # the grid has to go on by this factor on both sides of the value


@dataclass(frozen=True, slots=True)
class BestRate:
    """What a batch size needs at its best learning rate.

    Attributes:
        batch_size: examples a step.
        learning_rate: at the minimum of a parabola in log learning rate, where that helps; else the grid's best.
        grid_learning_rate: the best of those that were run.
        steps: at the minimum, as a geometric mean over seeds, with the bootstrap's interval; NaN where all learning
            rates have one seed.
        interior: a higher and a lower learning rate were tried and are worse (or failed).
        seeds: runs at the grid's best.
    """

    batch_size: float
    learning_rate: float
    grid_learning_rate: float
    steps: Estimate
    interior: bool
    seeds: int


@dataclass(frozen=True, slots=True)
class CriticalBatch:
    """What the runs say of one optimizer and one target.

    Attributes:
        critical_batch_size: E_min/S_min in examples; None where `reason` says why not.
        smallest_steps, smallest_examples: S_min and E_min; None together with it.
        exponent: alpha of the free fit; None where there are too few batch sizes.
        misfit: root mean square of the residuals of log S.
        best: by batch size, of all that reached the target.
        reason: why there is no value; empty where there is one.
        confidence: of all intervals.
    """

    critical_batch_size: Estimate | None
    smallest_steps: Estimate | None
    smallest_examples: Estimate | None
    exponent: Estimate | None
    misfit: float
    best: tuple[BestRate, ...]
    reason: str
    confidence: float

    @property
    def hyperbola_holds(self) -> bool | None:
        """Whether the free exponent's interval holds 1; None where it was not fitted."""
        return None if self.exponent is None else self.exponent.low <= 1.0 <= self.exponent.high


def critical_batch(
    cells: Iterable[Cell],
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    bracket: float = BRACKET,
    need_interior: bool = True,
    fewest_steps: float = 0.0,
    seed: int = 0,
) -> CriticalBatch:
    """Fit all runs to one target.

    Args:
        cells: every batch size and learning rate that was tried, failures too: they say where the grid ends.
        confidence: of the intervals, bias-corrected percentiles of the bootstrap.
        draws: of the bootstrap.
        bracket: the factor by which the batch sizes must go on beyond the value on both sides.
        need_interior: whether only batch sizes count whose best learning rate lies inside those tried; False where
            rates follow a rule and are no grid.
        fewest_steps: the smallest S_min that is a value: what is reached in fewer measures the start.
        seed: of the bootstrap's generator.
    """
    drawn = bootstrap_best(cells, draws, seed)
    best = tuple(_best_rate(each, confidence) for each in drawn)
    used = [each for each in drawn if each.interior or not need_interior]
    if reason := _too_little(drawn, used):
        return CriticalBatch(None, None, None, None, math.nan, best, reason, confidence)
    log_sizes = np.log([each.batch_size for each in used])
    log_steps = np.stack([each.log_steps for each in used], axis=1)  # (1 + draws, batch sizes): row 0 is the estimate
    fit = _fit_with_misfit(log_sizes, log_steps)
    critical = estimate(fit.log_critical_batch_size, confidence)
    steps = estimate(fit.log_smallest_steps, confidence)
    reason = _not_bracketed(critical, used, bracket) or _too_few_steps(steps.value, fewest_steps)
    free = _fit_with_misfit(log_sizes, log_steps, free_exponent=True)
    exponent = estimate(np.log(free.exponent), confidence)
    return _result(fit, critical, steps, exponent, best, reason, confidence)


def _result(
    fit: CurveFit,
    critical: Estimate,
    steps: Estimate,
    exponent: Estimate,
    best: tuple[BestRate, ...],
    reason: str,
    confidence: float,
) -> CriticalBatch:
    misfit = float(np.sqrt((fit.residuals[0] ** 2).mean()))
    if reason:
        return CriticalBatch(None, None, None, exponent, misfit, best, reason, confidence)
    examples = estimate(fit.log_smallest_steps + fit.log_critical_batch_size, confidence)
    return CriticalBatch(critical, steps, examples, exponent, misfit, best, "", confidence)


def _best_rate(drawn: DrawnBest, confidence: float) -> BestRate:
    steps = estimate(drawn.log_steps, confidence)
    if drawn.seeds < FEWEST_SEEDS and steps.low == steps.high:
        steps = Estimate(steps.value, math.nan, math.nan)
    return BestRate(
        drawn.batch_size,
        math.exp(drawn.log_rate[0]),
        drawn.grid_rate,
        steps,
        drawn.interior,
        drawn.seeds,
    )


def _fit_with_misfit(log_sizes: Array, log_steps: Array, *, free_exponent: bool = False) -> CurveFit:
    """The fit to all draws, after spreading them so far that they explain how far the runs lie from the curve.

    Seeds say how much chance there is in a batch size, not what its learning rates missed, nor that the curve is not
    quite theirs. Draws are spread by sqrt(chi^2 / degrees of freedom) where that is above 1, as the Particle Data
    Group does with measurements that agree worse than their errors say.
    """
    residuals = fit_curve(log_sizes, log_steps[:1], free_exponent=free_exponent).residuals[0]
    centre, variance = log_steps[1:].mean(axis=0), log_steps[1:].var(axis=0)
    chi2 = float((residuals**2 / np.maximum(variance, variance.mean() / 4 + 1e-12)).sum())
    spread = math.sqrt(max(1.0, chi2 / (len(log_sizes) - 2 - free_exponent)))
    draws = centre + spread * (log_steps[1:] - centre)
    return fit_curve(log_sizes, np.concatenate([log_steps[:1], draws]), free_exponent=free_exponent)


def _too_little(drawn: Sequence[DrawnBest], used: Sequence[DrawnBest]) -> str:
    if not drawn:
        return "no batch size reached the target with all its seeds: a higher target or more examples are needed"
    if len(drawn) < FEWEST_BATCH_SIZES:
        sizes = f"{len(drawn)} batch size{'s' * (len(drawn) != 1)}"
        return f"only {sizes} reached the target; it takes {FEWEST_BATCH_SIZES}"
    if len(used) < FEWEST_BATCH_SIZES:
        edge = ", ".join(f"{each.batch_size:g}" for each in drawn if not each.interior)
        return (
            f"the best learning rate lies on the edge of those tried at batch sizes {edge}; "
            f"it takes {FEWEST_BATCH_SIZES} batch sizes at which it lies inside"
        )
    if alone := [f"{each.batch_size:g}" for each in used if each.seeds < FEWEST_SEEDS]:
        sizes = f"batch size{'s' * (len(alone) != 1)} {', '.join(alone)}"
        return f"the best learning rate was run with one seed only at {sizes}; an interval takes {FEWEST_SEEDS}"
    return ""


def _too_few_steps(smallest: float, fewest: float) -> str:
    if smallest >= fewest:
        return ""
    return f"a huge batch would get there in {smallest:.3g} steps, fewer than {fewest:g}: a lower target is needed"


def _not_bracketed(critical: Estimate, used: Sequence[DrawnBest], bracket: float) -> str:
    smallest, largest = used[0].batch_size, used[-1].batch_size
    grid = f"the batch sizes that count, {smallest:g} to {largest:g}"
    if critical.value < bracket * smallest:
        return f"{grid}, do not reach a factor of {bracket:g} below the bend: smaller ones are needed"
    if critical.value > largest / bracket:
        return f"{grid}, do not reach a factor of {bracket:g} above the bend: larger ones are needed"
    if critical.low < smallest or critical.high > largest:
        return f"the interval goes beyond {grid}: more seeds or more batch sizes are needed"
    return ""
