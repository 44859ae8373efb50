"""What ranks average of a sampled step beside its rows: squared norms of the layers and groups, own and of the mean.

Each rank could take those of the mean gradient by itself, but ranks with different processors round sums differently, and
ranks that decide by numbers which differ in the last bit part company. The average is the same bits on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp.metering.parts import Parts
from ddp.noise.moments import Moments, Units
from ddp.noise.readings import Metric
from ddp.noise.tracker import PartMoments

METRICS: tuple[Metric, Metric] = ("plain", "preconditioned")


@dataclass(frozen=True, slots=True)
class SampledSquares:
    """Of one rank, or averaged over ranks; squared units of the gradient.

    Attributes:
        own: shape (parts, 2), plain and preconditioned: of the ranks' own units, weighted as the caller says.
        mean: shape (parts, 2), of the averaged gradient.
        preconditioned: of the whole averaged gradient; NaN where it was not taken.
    """

    own: NDArray[np.float64]
    mean: NDArray[np.float64]
    preconditioned: float = math.nan

    @classmethod
    def of(
        cls,
        parts: Parts | None,
        own: NDArray[np.float64],
        mean: NDArray[np.float64],
        *,
        preconditioned: bool,
    ) -> Self:
        """From squares by parameter, shape (parameters, 2); without parts only the last number is left."""
        whole = float(mean[:, 1].sum()) if preconditioned else math.nan
        if parts is None:
            return cls(np.zeros((0, 2)), np.zeros((0, 2)), whole)
        return cls(parts.sums(own), parts.sums(mean), whole)

    def pack(self) -> Tensor:
        """Shape (4 parts + 1,), float64."""
        return torch.from_numpy(np.concatenate([self.own.ravel(), self.mean.ravel(), [self.preconditioned]]))

    @classmethod
    def unpack(cls, vector: Tensor) -> Self:
        """The inverse of `pack`. Waits for the device."""
        values = vector.cpu().numpy()
        own, mean = values[:-1].reshape(2, len(values) // 4, 2)
        return cls(own, mean, float(values[-1]))

    @property
    def metrics(self) -> Sequence[Metric]:
        """Those that were taken on all ranks."""
        return METRICS[:1] if math.isnan(self.preconditioned) else METRICS

    def moments(
        self, parts: Parts | None, units: Units, population: float, *, own_factor: float, mean_factor: float = 1.0
    ) -> tuple[PartMoments, ...]:
        """Of each part, in each metric.

        Args:
            units: of the whole step, all ranks together.
            own_factor: what makes `own` sum v_u |g_u|^2.
            mean_factor: what makes `mean` that of the mean over the units.
        """
        if parts is None:
            return ()
        own, mean = (self.own * own_factor).tolist(), (self.mean * mean_factor).tolist()
        return tuple(
            PartMoments(*name, metric, _moments(units, own[row][column], mean[row][column], population))
            for column, metric in enumerate(self.metrics)
            for row, name in enumerate(parts.names)
        )


def _moments(units: Units, own: float, mean: float, population: float) -> Moments | None:
    """None for a part without any gradient, or without any whose second moments have settled."""
    return units.moments(own, mean, population) if own or mean else None
