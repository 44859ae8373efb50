"""Unbiased |G|^2 and tr(Sigma) of one step, from the squared norms of any mix of shards.

G is the gradient of the mean loss over the population and Sigma the covariance of one example's
gradient. Neither estimate is clamped: with little data an honest |G|^2 is often negative, and dropping
or clipping those steps biases every average made from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Moments:
    """One observation, in squared units of the gradient; either number may be negative."""

    squared_norm: float  # estimates |G|^2
    variance_trace: float  # estimates tr(Sigma) of one example


@dataclass(frozen=True, slots=True)
class Units:
    """The separately known gradients of a step, as the sums that the two formulas need of them; additive.

    A unit u is the mean gradient of `b_u` examples and enters the step's mean with the weight v_u, which need
    not be normalised: examples or tokens, say. A rank adds up its micro-batches, a step its ranks.
    """

    count: float = 0.0
    weight: float = 0.0  # sum v_u
    examples: float = 0.0  # sum b_u
    weight_per_example: float = 0.0  # sum v_u / b_u
    squared_weight_per_example: float = 0.0  # sum v_u^2 / b_u

    @classmethod
    def one(cls, examples: float, weight: float | None = None) -> Self:
        """A single unit; its weight is its examples unless said. Without examples or weight it is none."""
        share = examples if weight is None else weight
        if examples <= 0 or share <= 0:
            return cls()
        return cls(1.0, share, examples, share / examples, share * share / examples)

    def __add__(self, other: Units) -> Units:
        return Units(
            self.count + other.count,
            self.weight + other.weight,
            self.examples + other.examples,
            self.weight_per_example + other.weight_per_example,
            self.squared_weight_per_example + other.squared_weight_per_example,
        )

    def moments(
        self, weighted_squared_norms: float, mean_squared_norm: float, population: float = math.inf
    ) -> Moments | None:
        """Both moments, or None with fewer than two units or where a number is not finite.

        Args:
            weighted_squared_norms: sum v_u |g_u|^2.
            mean_squared_norm: |gbar|^2 of the mean over these units, gbar = sum v_u g_u / sum v_u.
            population: N, see `unbiased_moments`, which has the derivation.
        """
        if not self.count >= 2:
            return None
        single = self.weight_per_example / self.weight
        joint = self.squared_weight_per_example / (self.weight * self.weight)
        variance_trace = (weighted_squared_norms / self.weight - mean_squared_norm) / (single - joint)
        squared_norm = mean_squared_norm - variance_trace * (joint - 1.0 / population)
        if not math.isfinite(variance_trace + squared_norm):
            return None
        return Moments(squared_norm=squared_norm, variance_trace=variance_trace)


def unbiased_moments(
    own_squared_norms: Iterable[float],
    examples: Iterable[float],
    mean_squared_norm: float,
    weights: Iterable[float] | None = None,
    population: float = math.inf,
) -> Moments | None:
    """Both moments from the units of one step, or None where the step cannot give them.

    A unit r is one separately known gradient: a rank, or a rank's micro-batch. Its gradient g_r is the
    mean over b_r examples and enters the step's mean gbar = sum w_r g_r. Assumed is that the units'
    examples are drawn at random, independently of each other and of the weights, so that

        E g_r = G,    cov g_r = Sigma (1/b_r - 1/N),    cov(g_r, g_s) = -Sigma/N

    with N = infinity for independent draws. Writing T = tr(Sigma) and taking sum w_r = 1,

        E|g_r|^2  = |G|^2 + T (1/b_r - 1/N)
        E|gbar|^2 = |G|^2 + T (sum w_r^2/b_r - 1/N)

    and solving these two for T and |G|^2 gives, without bias for any b_r and w_r,

        S     = (sum w_r |g_r|^2 - |gbar|^2) / (sum w_r/b_r - sum w_r^2/b_r)
        |G|^2 = |gbar|^2 - S (sum w_r^2/b_r - 1/N)

    At two equal units and N = infinity this is the two-point formula of McCandlish et al. 2018
    (arXiv:1812.06162, appendix A.1). For finite N, S estimates the trace with denominator N - 1.

    Args:
        own_squared_norms: |g_r|^2 of each unit's own mean gradient; before clipping, loss scale undone.
        examples: b_r, how many examples each unit's gradient is the mean of. A unit without examples,
            or without weight, leaves all sums.
        mean_squared_norm: |gbar|^2 of the mean gradient.
        weights: w_r by which the units entered gbar, up to a common factor; b_r where left out. Where a
            unit without examples held some of it (its gradient counted as zero), gbar is rescaled to the
            mean over the others. With a mean over tokens w_r goes by tokens and b_r is the number of
            sequences, the unit of the result.
        population: N, where the step's examples are drawn without replacement from N; infinity for
            streams, for draws with replacement, and under augmentation or dropout.

    Returns:
        None with fewer than two units left, and where any number that counts is not finite: every rank
        sees the same numbers and so drops the same step.

    Raises:
        ValueError: the sequences differ in length, a number of examples or a weight is negative, or
            more examples were drawn than the population holds.
    """
    norms, counts = [float(value) for value in own_squared_norms], [float(value) for value in examples]
    shares = counts if weights is None else [float(value) for value in weights]
    if not len(norms) == len(counts) == len(shares):
        raise ValueError(f"{len(norms)} squared norms, {len(counts)} example counts and {len(shares)} weights differ")
    if not math.isfinite(mean_squared_norm + sum(counts) + sum(shares)):
        return None
    if min(counts, default=0.0) < 0 or min(shares, default=0.0) < 0:
        raise ValueError(f"negative example counts or weights: {counts}, {shares}")
    if sum(counts) > population:
        raise ValueError(f"{sum(counts):g} examples without replacement out of {population:g}: use population=inf")
    units, own = Units(), 0.0
    for norm, count, share in zip(norms, counts, shares, strict=True):
        unit = Units.one(count, share)
        units += unit
        own += unit.weight * norm if unit.count else 0.0
    if not units.count >= 2:
        return None
    return units.moments(own, mean_squared_norm * (sum(shares) / units.weight) ** 2, population)
