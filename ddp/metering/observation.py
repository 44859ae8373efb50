"""From the rows of a step to observations of the noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddp.noise.moments import Units
from ddp.noise.readings import Method
from ddp.transport.row import StepRow


@dataclass(frozen=True, slots=True)
class StepUnits:
    """The units of a step over all ranks, and the sums that the moments of the whole model need of them."""

    units: Units
    weighted_squared_norms: float  # sum v_u |g_u|^2
    weighted_preconditioned_norms: float  # NaN where some rank has none
    ranks: int  # that had examples

    @property
    def method(self) -> Method:
        """Ranks, unless a rank told its micro-batches apart."""
        if self.units.count < 2:
            return "none"
        return "ranks" if self.units.count == self.ranks else "micro_batches"


def step_units(rows: Sequence[StepRow]) -> StepUnits:
    """Add up the rows. A rank that tells no units of its own is one, with the weight of its examples."""
    units, plain, preconditioned, ranks = Units(), 0.0, 0.0, 0
    for row in rows:
        if row.examples <= 0:
            continue
        ranks += 1
        if row.units > 0:
            units += Units(row.units, row.weight, row.examples, row.weight_per_example, row.squared_weight_per_example)
            plain += row.weighted_squared_norms
            preconditioned += row.weighted_preconditioned_norms
        else:
            units += Units.one(row.examples)
            plain += row.examples * row.own_squared_norm
            preconditioned = math.nan
    return StepUnits(units, plain, preconditioned, ranks)
