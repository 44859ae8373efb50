"""From the rows of an attached script's step to moments, where DDP has averaged with 1/world_size.

Each rank's gradient then enters with the same weight whatever examples it stands for: v_r = 1, spread over the rank's
backwards. A script that makes the average the mean over tokens of all ranks does so by scaling its loss: the gradient of
rank r is h_r = (R t_r / T) g_r, with g_r the mean over its own t_r of T tokens and R ranks. So g_r = T/(R t_r) h_r, and
its weight in the mean is v_r = t_r. Without such scaling all t_r are 1 and g_r = h_r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddp.metering.closer_look import Look
from ddp.metering.parts import Parts
from ddp.metering.sampled_squares import SampledSquares
from ddp.noise.moments import Moments, Units
from ddp.noise.readings import Method
from ddp.transport.row import StepRow


@dataclass(frozen=True, slots=True)
class RankAverage:
    """The units of one step over all ranks.

    Attributes:
        weighted_squared_norms: sum v_u |g_u|^2.
        weighted_preconditioned_norms: the same of sqrt(P) g; NaN where some rank has none.
        mean_factor: from the squared norm of DDP's average to that of the mean over the units: a rank without
            examples holds a share of the average, and its gradient is zero.
        parts_factor: from the ranks' average of own squares, see `sampled_squares`, to sum v_u |g_u|^2.
    """

    units: Units
    weighted_squared_norms: float
    weighted_preconditioned_norms: float
    mean_factor: float
    parts_factor: float
    method: Method

    def moments(self, weighted_squared_norms: float, mean_squared_norm: float, population: float) -> Moments | None:
        """Of the whole model or a part of it; `mean_squared_norm` is of DDP's average."""
        return self.units.moments(weighted_squared_norms, mean_squared_norm * self.mean_factor, population)


def rank_average(rows: Sequence[StepRow]) -> RankAverage:
    """Add up the rows, whose `weight` is t_r."""
    total = sum(row.weight for row in rows)
    units, plain, preconditioned, ranks = Units(), 0.0, 0.0, 0
    for row in rows:
        if row.examples <= 0 or row.weight <= 0:
            continue
        ranks += 1
        factor = (total / (len(rows) * row.weight)) ** 2
        if row.units > 0:
            units += Units(row.units, row.weight, row.examples, row.weight_per_example, row.squared_weight_per_example)
            plain += factor * row.weighted_squared_norms
            preconditioned += factor * row.weighted_preconditioned_norms
        else:
            units += Units.one(row.examples, row.weight)
            plain += factor * row.weight * row.own_squared_norm
            preconditioned = math.nan
    mean_factor = (total / units.weight) ** 2 if units.weight > 0 else math.nan
    method: Method = "none" if units.count < 2 else "ranks" if units.count == ranks else "micro_batches"
    return RankAverage(units, plain, preconditioned, mean_factor, total * total / len(rows), method)


def unit_fields(look: Look | None, examples: float, weight: float, scale: float) -> dict[str, float]:
    """The fields of a StepRow that come from a closer look.

    With k backwards of equal weight the rank's gradient is the sum of h_u, and g_u = k h_u.

    Args:
        examples: b_r, shared out over the backwards by their forwards.
        weight: t_r.
        scale: of the loss.
    """
    if look is None or look.own is None or examples <= 0 or weight <= 0:
        return {"weight": weight}
    seen = look.own.units
    count, per_forward = seen.count, examples / seen.examples
    plain, preconditioned = (look.own.weighted.sum(axis=0) * weight * count / scale**2).tolist()
    return {
        "units": count,
        "weight": weight,
        "weight_per_example": weight / count / per_forward * seen.weight_per_example,
        "squared_weight_per_example": (weight / count) ** 2 / per_forward * seen.squared_weight_per_example,
        "weighted_squared_norms": plain,
        "weighted_preconditioned_norms": preconditioned if look.preconditioned else math.nan,
    }


def sampled_squares(
    parts: Parts | None, look: Look | None, examples: float, weight: float, scale: float
) -> SampledSquares:
    """What ranks average: as `own` k sum |h_u|^2 / t_r by part; NaN where this rank cannot tell."""
    rows = 0 if parts is None else len(parts.names)
    unknown = np.full((rows, 2), math.nan)
    if look is None:
        return SampledSquares(unknown, unknown)
    mean = look.mean_squares / scale**2
    if examples <= 0 or weight <= 0:
        own = np.zeros_like(mean)
    elif look.own is None:
        own = np.full_like(mean, math.nan)
    else:
        own = look.own.weighted * (look.own.units.count / (weight * scale**2))
    return SampledSquares.of(parts, own, mean, preconditioned=look.preconditioned)
