"""What a training step measures of its gradients: the noise scales, and whether the ranks' shards are what they assume."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ddp.job import NoiseScaleSection
from ddp.metering.measurement import NoiseMeasurement, Settings, has_batch_statistics
from ddp.noise.readings import NoiseReadings
from ddp.noise.shards import ShardWatch
from ddp.noise.tracker import NoiseScaleTracker
from ddp.training.data import BatchPlan, StepData
from ddp.transport.comm_hook import GradientExchange, GradientSums
from ddp.transport.row import StepRow

logger = logging.getLogger("ddp.training")


class GradientWatch:
    """One rank's; where the noise scale is switched off it watches the shards alone.

    `shards` and `tracker` go into checkpoints. `training_examples`: None for a stream. `steady`: training follows the readings, so that which steps are sampled must not be left to a clock.
    """

    def __init__(
        self,
        section: NoiseScaleSection,
        module: nn.Module,
        optimizer: Optimizer,
        exchange: GradientExchange,
        training_examples: int | None,
        *,
        with_replacement: bool = False,
        steady: bool = False,
    ) -> None:
        self._rank, self._world_size = exchange.transport.rank, exchange.transport.world_size
        self.shards = ShardWatch()
        self._measurement: NoiseMeasurement | None = None
        if section.enabled:
            settings = Settings(
                training_examples=training_examples,
                population=math.inf
                if with_replacement or training_examples is None
                else population(module, training_examples),
                sample_every="steady" if steady and section.sample_every == "auto" else section.sample_every,
                split=section.split,
                layers=section.layers,
            )
            self._measurement = NoiseMeasurement(module, optimizer, exchange, settings)
            if self._rank == 0 and has_batch_statistics(module):
                logger.info(
                    "the model normalises by batch statistics: the gradients of a micro-batch's examples depend on each "
                    "other, so the noise scale is that of micro-batches of this size"
                )

    @property
    def tracker(self) -> NoiseScaleTracker | None:
        """What goes into checkpoints."""
        return None if self._measurement is None else self._measurement.tracker

    def least_parts(self, step: int) -> int:
        """Micro-batches that `step` has at least: two where one rank's only one is split for the noise scale."""
        if self._measurement is None or self._world_size > 1:
            return 1
        return 2 if self._measurement.splits(step) else 1

    def begin(self, step: int, data: StepData, plan: BatchPlan) -> None:
        """Before the step's first backward."""
        if self._measurement is not None:
            accumulates = plan.passes(data.global_examples) > 1
            halves = not accumulates and len(data.micro_batches) > 1
            self._measurement.begin(step, accumulates=accumulates or halves, halves=halves)

    def end_micro_batch(self, examples: int, divisor: float) -> None:
        """After each backward, of the sum of the micro-batch's losses over `divisor`."""
        if self._measurement is not None:
            self._measurement.end_unit(examples, divisor)

    def row_fields(self, sums: GradientSums) -> dict[str, float]:
        """What this rank's row says of its gradients."""
        own = {} if self._measurement is None else self._measurement.row_fields()
        return {"own_squared_norm": sums.own_squared_norm, **own}

    def restart(self, step: int) -> None:
        """The batch is another after `step`: its noise scale is to be seen soon."""
        if self._measurement is not None:
            self._measurement.tracker.cadence.restart(step)

    def observe(self, rows: Sequence[StepRow], sums: GradientSums) -> NoiseReadings | None:
        """Of a step that is finite on all ranks, before clipping: what is measured is the gradient as it came."""
        fault = self.shards.observe(
            [row.own_squared_norm for row in rows], [row.projection for row in rows], [row.examples for row in rows]
        )
        if fault is not None and self._rank == 0:
            logger.warning(fault)
        return None if self._measurement is None else self._measurement.observe(rows, sums)


def population(model: nn.Module, training_examples: int) -> float:
    """Examples that a batch is drawn from without replacement; infinite where dropout or augmentation makes each draw new."""
    return math.inf if any(map(_draws_anew, model.modules())) else float(training_examples)


def _draws_anew(module: nn.Module) -> bool:
    if getattr(module, "draws_anew", False):  # a task's own layer says so, of augmentation for example
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0  # they do it themselves
