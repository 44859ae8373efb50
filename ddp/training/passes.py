"""Forward and backward of one step on one rank: its micro-batches, in the job's precision, at the weights or uphill of them.

The gradient that leaves is that of the mean over the examples of all ranks: the last backward sends the buckets, with
this rank's weight, in which a loss scale is undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddp.errors import UsageError
from ddp.job import Job
from ddp.tasks.base import Batch, Task, loss_and_metrics_of
from ddp.training.data import BatchPlan, StepData, to_device
from ddp.training.measuring import GradientWatch
from ddp.training.phases import PhaseClock
from ddp.training.precision import LossScale, autocast
from ddp.training.sampling import Sampler
from ddp.training.sharpness import Sharpness
from ddp.transport.comm_hook import GradientExchange, GradientSums


@dataclass(frozen=True, slots=True)
class PassTotals:
    """Of one step on one rank, before anything is exchanged but the gradient."""

    sums: GradientSums  # the loss scale undone
    loss_sum: float  # over the rank's examples
    metric_sum: float  # of evaluation.metric; NaN where the task gives none in a step
    finite: bool  # loss and gradient


class Passes:
    """How one rank gets its gradient."""

    def __init__(
        self,
        job: Job,
        task: Task,
        model: DistributedDataParallel,
        device: torch.device,
        exchange: GradientExchange,
        sampler: Sampler,
    ) -> None:
        self._precision, self._task, self._model, self._device = job.precision, task, model, device
        self._exchange, self._sampler = exchange, sampler
        self._both = loss_and_metrics_of(task)
        self._metric = job.evaluation.metric
        rho = job.optimizer.sam_rho
        self._sharpness = None if rho is None else Sharpness(model.module, rho)
        self.scale = LossScale.of(job.precision)  # goes into checkpoints
        self._synchronised = job.normalisation.sync_batch_norm

    def take(self, step: int, data: StepData, plan: BatchPlan, clock: PhaseClock, watch: GradientWatch) -> PassTotals:
        """All of a step; `watch` sees the gradient that is sent. Collective, by the last backward.

        Raises:
            UsageError: the task does not give one value an example.
            TransportError: see `GradientExchange.take`.
        """
        if self._sharpness is None:
            watch.begin(step, data, plan)
            loss_sum, metric_sum = self._accumulate(data, clock, watch)
        else:
            at_the_weights: list[tuple[float, float]] = []
            with self._sharpness.uphill(lambda: at_the_weights.append(self._accumulate(data, clock))):
                watch.begin(step, data, plan)
                self._accumulate(data, clock, watch)
            loss_sum, metric_sum = at_the_weights[0]
        sums = self._exchange.take().unscaled(self._scale(data))
        finite = math.isfinite(loss_sum) and math.isfinite(sums.own_squared_norm)
        return PassTotals(sums, loss_sum, metric_sum, finite)

    def losses(self, batch: Batch) -> Tensor:
        """Those of each example, shape (examples,), with a graph."""
        return self._losses(batch)[0]

    def forward_context(self) -> AbstractContextManager[Any]:
        """The job's precision, for whoever else runs the model."""
        return autocast(self._precision, self._device)

    def _accumulate(self, data: StepData, clock: PhaseClock, watch: GradientWatch | None = None) -> tuple[float, float]:
        """Sums of loss and metric; the gradient of the mean over this rank's examples, scaled, is accumulated.

        It is sent where there is a `watch` to see it.
        """
        scale, weight = self._scale(data), data.examples / data.global_examples
        self._exchange.weight = weight / scale
        loss_sum, metric_sum, count = 0.0, 0.0, 0
        for index, micro_batch in enumerate(data.micro_batches):
            last = watch is not None and index == len(data.micro_batches) - 1
            with nullcontext() if last else self._model.no_sync():
                losses, values = self._losses(micro_batch)
                if watch is None or self._sharpness is None:  # at the weights
                    self._sampler.observe(losses, data, index)
                loss = self._sampler.weigh(losses, data, index).sum()
                clock.lap("forward", then="backward")
                (loss * (scale / data.examples) if scale != 1.0 else loss / data.examples).backward()
                clock.lap("backward", then="exchange" if last else "forward")
            if watch is not None:
                watch.end_micro_batch(len(losses), data.examples / scale)
            loss_sum += loss.item()
            metric_sum += math.nan if values is None else float(values.detach().sum(dtype=torch.float64))
            count += len(losses)
        self._exchange.weight = weight  # of what is averaged besides
        if count != data.examples:
            raise UsageError(f"task: loss gave {count} values for {data.examples} examples; one an example is needed")
        return loss_sum, metric_sum

    def _scale(self, data: StepData) -> float:
        """That the rank's gradient has until it enters the mean.

        Synchronised normalisation adds up what ranks send back in backward: there each example has to count alike, also
        where shares differ.
        """
        if not self._synchronised:
            return self.scale.value
        return self.scale.value * (data.examples * self._exchange.transport.world_size / data.global_examples)

    def _losses(self, micro_batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss of each example, and the metric of each where the task gives it in the same forward."""
        batch, metrics = to_device(micro_batch, self._device), None
        with self.forward_context():
            if self._both is None:
                losses = self._task.loss(self._model, batch)
            else:
                losses, metrics = self._both(self._model, batch)
        if losses.dim() != 1:
            raise UsageError(
                f"task: loss has the shape {tuple(losses.shape)}; one value an example is needed, (examples,)"
            )
        return losses, self._values(metrics, len(losses))

    def _values(self, metrics: Mapping[str, Tensor] | None, examples: int) -> Tensor | None:
        values = None if metrics is None else metrics.get(self._metric)
        if values is not None and tuple(values.shape) != (examples,):
            raise UsageError(
                f"task: {self._metric} has the shape {tuple(values.shape)}; one value an example is needed, ({examples},)"
            )
        return values
