"""The step's row: what each rank tells all others about its step, as a few float64 numbers.

Everything that ranks must agree on in a step is read from these rows: the noise scale, the mean loss, whether
a gradient is finite, whether a signal came, who is slow. No other control collective is needed.
Times are those of the previous step, since the present one is not over when the row is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Self

import numpy as np
from numpy.typing import NDArray

ROW_LENGTH = 40
DIRECTIONS = 8  # on which gradients are projected
NO_PROJECTION = (0.0,) * DIRECTIONS


@dataclass(frozen=True, slots=True)
class StepRow:
    """One rank's numbers of one step."""

    examples: float
    own_squared_norm: float  # of the gradient of the mean over this rank's examples
    loss_sum: float = 0.0  # over this rank's examples
    finite: float = 1.0  # loss and gradient
    stop: float = 0.0  # a signal asked this rank to stop
    data_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    all_reduce_seconds: float = 0.0
    wait_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    units: float = 0.0  # separately known gradients of this rank in this step; 0: the rank's own is the one
    weight: float = 0.0  # this and the four below: sums over the units, see ddp.noise.moments.Units
    weight_per_example: float = 0.0
    squared_weight_per_example: float = 0.0
    weighted_squared_norms: float = 0.0
    weighted_preconditioned_norms: float = 0.0
    measuring_seconds: float = 0.0  # spent on sampling in the previous step, in whichever phases; 0: it was not sampled
    mean_squared_norm: float = 0.0  # of the averaged gradient; all ranks go by rank 0's, which may round otherwise
    measure_seconds: float = 0.0  # from the row to the optimizer, where the sampled and all other steps are entered
    part_saved: float = 0.0  # the step whose part of a checkpoint this rank wrote last; minus it where that failed
    save_due: float = 0.0  # rank 0's clock says that it is time for a checkpoint
    checksum_high: float = 0.0  # of the parameters after the previous step, see ddp.training.replicas; 0: not taken
    checksum_low: float = 0.0
    metric_sum: float = (
        math.nan
    )  # of evaluation.metric over this rank's examples; NaN where the task gives none in a step
    cpu_seconds: float = 0.0  # processor time of this rank in the previous step
    projection: tuple[float, ...] = NO_PROJECTION  # of the own gradient: tells shards apart that are not exchangeable

    @property
    def own_seconds(self) -> float:
        """This rank's way to its last gradient in the previous step, waiting not counted."""
        return self.data_seconds + self.forward_seconds + self.backward_seconds

    @property
    def step_seconds(self) -> float:
        """What the previous step took on this rank, `measuring_seconds` and all."""
        own = self.own_seconds + self.optimizer_seconds
        return own + self.all_reduce_seconds + self.wait_seconds + self.measure_seconds

    def pack(self) -> NDArray[np.float64]:
        """Shape (ROW_LENGTH,): the numbers in their order, the projection's last; unused places zero."""
        row = np.zeros(ROW_LENGTH)
        numbers = _numbers(self)
        row[: len(numbers)] = numbers
        row[len(numbers) : len(numbers) + DIRECTIONS] = self.projection
        return row

    @classmethod
    def unpack(cls, row: NDArray[np.float64]) -> Self:
        """The inverse of `pack`."""
        values, numbers = row.tolist(), len(fields(cls)) - 1
        return cls(*values[:numbers], projection=tuple(values[numbers : numbers + DIRECTIONS]))


_numbers: Callable[[StepRow], tuple[float, ...]] = attrgetter(*[field.name for field in fields(StepRow)][:-1])
