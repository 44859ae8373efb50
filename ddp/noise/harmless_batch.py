"""The largest batch that does no harm: how far the batch may grow before the same loss takes more examples.

Another question than the critical batch size, whose examples are by definition twice the smallest possible. It is
asked as an equivalence test: a larger batch is harmless when its examples to the target are shown to be at most
`margin` times the smallest batch's, not when a difference merely failed to show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ddp.noise.best_rate import DRAWS, Cell, DrawnBest, bootstrap_best
from ddp.noise.estimate import exp
from ddp.noise.interval import t_quantile

MARGIN = 1.25  # with its inverse 0.8 the limits of bioequivalence, where two treatments count as one
SIGNIFICANCE = 0.05

Verdict = Literal["equivalent", "fewer", "harmful", "undecided"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Examples to the target at a batch size, over those at the smallest; both at their best learning rates.

    Attributes:
        ratio, low, high: geometric mean over seeds, and the interval of confidence 1 - 2 * significance that the two
            one-sided tests go by.
        verdict: `equivalent` where it lies within 1/margin and margin; `fewer` where examples are shown not to be
            more, and may be less than 1/margin; `harmful` where it lies above margin; else `undecided`.
    """

    batch_size: float
    ratio: float
    low: float
    high: float
    verdict: Verdict

    @property
    def harmless(self) -> bool:
        return self.verdict in ("equivalent", "fewer")


@dataclass(frozen=True, slots=True)
class HarmlessBatch:
    """The largest batch size up to which every one tried is harmless.

    Attributes:
        batch_size: None where not even the second smallest is shown to be harmless.
        base: the batch size that all are compared with.
        at_least: it is the largest one tried, so the limit lies beyond.
        margin, significance: of the tests.
        comparisons: with each larger batch size, ascending.
    """

    batch_size: float | None
    base: float
    at_least: bool
    margin: float
    significance: float
    comparisons: tuple[Comparison, ...]


def largest_harmless_batch(
    cells: Iterable[Cell],
    *,
    margin: float = MARGIN,
    significance: float = SIGNIFICANCE,
    need_interior: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
) -> HarmlessBatch | None:
    """Two one-sided tests (Schuirmann 1987) of log examples against the smallest batch size that reached the target.

    Batch sizes are tested in ascending order up to the first that is not harmless, so that the chance of calling a
    harmful one harmless stays `significance` over all of them. Standard errors come from the bootstrap over seeds with the
    choice of the learning rate inside, degrees of freedom from the seeds of both batch sizes.

    Args:
        cells: as for `critical_batch`; at least two seeds a cell.
        margin: the largest ratio of examples that counts as no harm, above 1.
        significance: of each test.
        need_interior: whether only batch sizes count whose best learning rate lies inside those tried, as for
            `critical_batch`: at the edge one takes more examples than it would have to, and makes others look harmless.

    Returns:
        None with fewer than two batch sizes that count.
    """
    drawn = [each for each in bootstrap_best(cells, draws, seed) if each.interior or not need_interior]
    if len(drawn) < 2:
        return None
    comparisons = tuple(_compare(drawn[0], each, margin, significance) for each in drawn[1:])
    passed = 0
    while passed < len(comparisons) and comparisons[passed].harmless:
        passed += 1
    largest = comparisons[passed - 1].batch_size if passed else None
    at_least = bool(passed) and passed == len(comparisons)
    return HarmlessBatch(largest, drawn[0].batch_size, at_least, margin, significance, comparisons)


def _compare(base: DrawnBest, other: DrawnBest, margin: float, significance: float) -> Comparison:
    logs = other.log_steps - base.log_steps + math.log(other.batch_size / base.batch_size)
    degrees = base.seeds + other.seeds - 2
    deviation = float(logs[1:].std())
    known = min(base.seeds, other.seeds) > 1
    half = t_quantile(1 - 2 * significance, degrees) * deviation if known else math.inf
    low, high = float(logs[0]) - half, float(logs[0]) + half
    verdict = _verdict(low, high, math.log(margin))
    return Comparison(other.batch_size, exp(float(logs[0])), exp(low), exp(high), verdict)


def _verdict(low: float, high: float, limit: float) -> Verdict:
    if high < limit:
        return "equivalent" if low > -limit else "fewer"
    return "harmful" if low > limit else "undecided"
