"""The noise scales of one training run, step by step: what is looked at, when, and what comes of it.

    begin(step, ...)       a sampled step gets leaf hooks
    end_unit(...)          after each micro-batch's backward
    row_fields()           this rank's part of the step's row, after its last backward
    observe(rows, sums)    all ranks' rows and the averaged gradient -> NoiseReadings

Ranks are units in every step, at no cost: the comm hook takes their squared norms anyway. Micro-batches, layers and
preconditioned norms are taken in sampled steps. All ranks sample the same ones, since they decide from the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp.metering.observation import StepUnits, step_units
from ddp.metering.parts import parts_of
from ddp.metering.preconditioner import preconditioner_of
from ddp.metering.probe import GradientProbe, UnitSums
from ddp.metering.sampled_squares import SampledSquares
from ddp.noise.readings import Method, NoiseReadings
from ddp.noise.sampling import STEADY_INTERVAL, SampleEvery, relaxed
from ddp.noise.tracker import NoiseScaleTracker, StepMoments
from ddp.transport.comm_hook import GradientExchange, GradientSums
from ddp.transport.gradient_squares import Denominator
from ddp.transport.row import StepRow


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured; the job's [noise_scale] table, and what the data are.

    Attributes:
        population: examples that a step's are drawn from without replacement; infinite where they are not.
        sample_every: K, or how it is chosen, see `SamplingCadence`.
        split: one rank without accumulation: take sampled steps in two halves ("auto": unless the model has batch
            statistics), every step (True), or none.
        layers: one noise scale a layer, and a parameter group where there are several.
    """

    training_examples: int | None
    population: float = math.inf
    sample_every: SampleEvery = "auto"
    split: Literal["auto"] | bool = "auto"
    layers: bool = True


@dataclass(slots=True)
class _Sample:
    """A sampled step under way."""

    halves: bool  # the units are the halves of one rank's batch
    hooked: bool  # own squared norms come from leaf hooks
    denominators: Mapping[Tensor, Denominator] | None  # Adam's, once they have settled
    own: UnitSums | None = None


class NoiseMeasurement:
    """Of one model and its optimizer; on each rank.

    Attributes:
        tracker: the windows; goes into checkpoints.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer | None, exchange: GradientExchange, settings: Settings
    ) -> None:
        self.settings = settings
        self.tracker = NoiseScaleTracker(settings.training_examples, sample_every=settings.sample_every)
        self._seconds = self._previous_seconds = 0.0  # spent on a sampled step
        self._exchange = exchange
        self._preconditioner = preconditioner_of(optimizer)
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._parts = parts_of(module, self._parameters, optimizer) if settings.layers else None
        self._probe = GradientProbe(self._parameters)
        self._batch_statistics = has_batch_statistics(module)
        self._sample: _Sample | None = None
        self._sampled_every = 0  # as of the last step that could be sampled
        self._probe.prepare()
        if exchange.transport.world_size > 1 and self._parameters[0].device.type == "cpu":
            exchange.transport.prepare({torch.float64})

    def splits(self, step: int) -> bool:
        """Whether the only rank takes its only micro-batch of this step in two halves.

        Two halves round otherwise than one whole, and a run must not depend on a clock: it goes by the step alone, and
        by the last change of a batch that adapts itself.
        """
        if self.settings.split != "auto":
            return self.settings.split
        return not self._batch_statistics and step % self._split_every(step) == 0

    def begin(self, step: int, *, accumulates: bool, halves: bool = False) -> None:
        """Before the first backward of `step`, 1 for the first.

        Args:
            accumulates: a rank may have several micro-batches in this step; the same on all ranks.
            halves: they are the halves of a batch that was split.
        """
        began = time.perf_counter()
        self._previous_seconds, self._seconds = self._seconds, 0.0
        self._sample = self._sample_of(step, accumulates=accumulates, halves=halves)
        if self._sample is not None:
            self.tracker.cadence.took(step)
            if self._sample.hooked:
                self._probe.start(self._sample.denominators)
            self._seconds = time.perf_counter() - began

    def end_unit(self, examples: int, divisor: float) -> None:
        """After the backward of a micro-batch whose loss was the sum over it divided by `divisor`: the rank's examples."""
        if self._sample is not None and self._sample.hooked:
            self._probe.end_unit(examples, weight=examples, factor=divisor / examples)

    def row_fields(self) -> dict[str, float]:
        """This rank's part of the step's row, after the last backward."""
        fields, sample = {"measuring_seconds": self._previous_seconds}, self._sample
        if sample is None or not sample.hooked:
            return fields
        began = time.perf_counter()
        sample.own = own = self._probe.stop()
        plain, preconditioned = own.weighted.sum(axis=0).tolist()
        self._seconds += self._probe.hook_seconds + time.perf_counter() - began
        return fields | {
            "units": own.units.count,
            "weight": own.units.weight,
            "weight_per_example": own.units.weight_per_example,
            "squared_weight_per_example": own.units.squared_weight_per_example,
            "weighted_squared_norms": plain,
            "weighted_preconditioned_norms": preconditioned,
        }

    def observe(self, rows: Sequence[StepRow], sums: GradientSums) -> NoiseReadings:
        """Take the step in. Collective in a sampled step; to be called before clipping and the optimizer's step.

        The rows' `mean_squared_norm` counts, rank 0's; of `sums` those of single parameters, in sampled steps.
        """
        began = time.perf_counter()
        sample, self._sample = self._sample, None
        cadence, units = self.tracker.cadence, step_units(rows)
        cadence.observe(max(row.measuring_seconds for row in rows), max(row.step_seconds for row in rows))
        moments = self._moments(units, sample, rows, sums)
        readings = self.tracker.observe(moments, sampled_every=self._sampled_every)
        if sample is not None:
            self._seconds += time.perf_counter() - began
        return readings

    def _sample_of(self, step: int, *, accumulates: bool, halves: bool) -> _Sample | None:
        ranks, preconditioner = self._exchange.transport.world_size, self._preconditioner
        several = accumulates or ranks > 1
        if not several or not (accumulates or preconditioner or self._parts is not None):
            return None  # nothing to compare, or nothing that is not known in every step
        self._sampled_every = self._split_every(step) if halves else self.tracker.cadence.interval(step)
        if not halves and not self.tracker.cadence.is_due(step):
            return None
        denominators = preconditioner.settled() if preconditioner is not None else None
        return _Sample(halves, accumulates or denominators is not None, denominators)

    def _split_every(self, step: int) -> int:
        if self.settings.split is True:
            return 1
        given = self.settings.sample_every
        return min(STEADY_INTERVAL, relaxed(step, self.tracker.cadence.restarted)) if isinstance(given, str) else given

    def _moments(
        self, units: StepUnits, sample: _Sample | None, rows: Sequence[StepRow], sums: GradientSums
    ) -> StepMoments:
        """Of numbers that are the same bits on all ranks, which decide by them: from the rows, or averaged."""
        population = self.settings.population
        plain = units.units.moments(units.weighted_squared_norms, rows[0].mean_squared_norm, population)
        if sample is None:
            return StepMoments(units.method, plain)
        method: Method = "split" if sample.halves and units.method == "micro_batches" else units.method
        if self._parts is None and sample.denominators is None:
            return StepMoments(method, plain)
        squares, preconditioned = self._squares(sample, sums), None
        if sample.denominators is not None:
            own = units.weighted_preconditioned_norms
            preconditioned = units.units.moments(own, squares.preconditioned, population)
        parts = squares.moments(self._parts, units.units, population, own_factor=units.units.weight)
        return StepMoments(method, plain, preconditioned, parts)

    def _squares(self, sample: _Sample, sums: GradientSums) -> SampledSquares:
        """They meet in one small average over ranks, own squares with the weights that their gradients had."""
        own, mean = self._own_squares(sample, sums), self._mean_squares(sample, sums)
        squares = SampledSquares.of(self._parts, own, mean, preconditioned=sample.denominators is not None)
        return SampledSquares.unpack(self._averaged(squares.pack()))

    def _mean_squares(self, sample: _Sample, sums: GradientSums) -> NDArray[np.float64]:
        """Squared norms of the averaged gradient by parameter, shape (parameters, 2)."""
        if sample.denominators is not None:
            return self._probe.mean_squares()
        by_parameter = sums.by_parameter()
        return np.array([(by_parameter[parameter][1], 0.0) for parameter in self._parameters])

    def _own_squares(self, sample: _Sample, sums: GradientSums) -> NDArray[np.float64]:
        """sum v_u |g_u|^2 / sum v_u over this rank's units, by parameter, shape (parameters, 2)."""
        if sample.own is not None:
            return sample.own.weighted / sample.own.units.weight
        by_parameter = sums.by_parameter()
        return np.array([(by_parameter[parameter][0], 0.0) for parameter in self._parameters])

    def _averaged(self, values: Tensor) -> Tensor:
        transport = self._exchange.transport
        if transport.world_size == 1:
            return values
        vector = values.to(self._parameters[0].device)
        reduction = transport.all_reduce_mean_(vector, self._exchange.weight)
        transport.complete()
        if reduction.future is not None:
            reduction.future.wait()
        if reduction.error is not None:
            raise reduction.error
        return vector


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether an example's gradient depends on the others of its batch: batch normalisation while training."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training for each in module.modules())
