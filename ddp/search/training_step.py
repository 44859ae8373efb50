"""The steps of a trial: the mean gradient of a batch, micro-batch by micro-batch, and the noise scale from some of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddp.noise.moments import Moments
from ddp.search.curve import next_look
from ddp.search.gradient_noise import GradientSums, adam_preconditioner, squared_norm
from ddp.search.request import Trial
from ddp.search.workload import Workload, normalisation_layers
from ddp.training.data import BatchPlan, fetcher, split, to_device
from ddp.training.measuring import population
from ddp.training.optimizers import build_optimizer, clip_, set_rate_
from ddp.training.random_state import preserved_random_state

UNITS = 4  # separate gradients of a sample of the noise scale
PROBE_EXAMPLES = 64  # a sample has at least so many: at batch size 4 the step's own would say next to nothing
RULE_WINDOW, RULE_SPACING = 4, 50  # samples that the learning-rate rule follows, and how near: 1/50 of the steps
PROBE_SEED = 2  # beside the job's and the trial's


class TrainingStep:
    """Takes steps with one model; samples the noise scale as often as the loss is looked at."""

    def __init__(self, workload: Workload, trial: Trial, model: nn.Module) -> None:
        job = workload.sweep.job
        self._workload, self._trial, self._model = workload, trial, model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        section = job.optimizer.model_copy(update={"learning_rate": trial.learning_rate})
        self._optimizer = build_optimizer(section, model.named_parameters())
        self._population = population(model, workload.training_examples)
        self._fetch = fetcher(workload.training)
        self._stream = stream(workload.training_examples, job.run.seed + trial.seed, trial.batch_size)
        self._probes = np.random.default_rng((job.run.seed, trial.seed, PROBE_SEED))
        self._shares_statistics = bool(normalisation_layers(model))
        largest = min(workload.sweep.micro_batch_size, trial.batch_size)
        sampled = max(trial.batch_size, min(PROBE_EXAMPLES, workload.training_examples))
        # Batch statistics make what the micro-batch is part of the model: there it is one size for everything.
        self.unit_examples = largest if self._shares_statistics else min(largest, -(-sampled // UNITS))
        self._next_sample = 1
        self._seconds: list[float] = []
        self._sampled_seconds: list[float] = []
        self.plain: list[tuple[int, Moments]] = []
        self.preconditioned: list[tuple[int, Moments]] = []

    def take(self, step: int) -> bool:
        """One step; false where its gradient is not finite, and then nothing was changed."""
        started = time.perf_counter()
        sampling = step >= self._next_sample
        examples = next(self._stream)
        if sampling:
            self._next_sample = self._sample_after(step)
            gradients = self._sample(step, examples)
        else:
            largest = self.unit_examples if self._shares_statistics else self._workload.sweep.micro_batch_size
            gradients = self._sums(examples, -(-len(examples) // largest), None).mean
        finite = self._update(step, gradients)
        (self._sampled_seconds if sampling else self._seconds).append(time.perf_counter() - started)
        return finite

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Go on with the moments of another run of this model; the learning rate stays the trial's."""
        self._optimizer.load_state_dict(state)

    def median_seconds(self) -> float:
        """Of the steps that sampled nothing, where there are some."""
        return statistics.median(self._seconds or self._sampled_seconds or [math.nan])

    def _sample_after(self, step: int) -> int:
        """A rule that follows the noise scale must not follow it from afar."""
        if self._workload.sweep.section.learning_rate_rule == "constant":
            return next_look(step)
        return step + 1 + step // RULE_SPACING

    def _sample(self, step: int, examples: list[int]) -> list[Tensor]:
        """The step's gradient, and the noise scale from its parts, or from other examples where they are too few."""
        preconditioner = adam_preconditioner(self._optimizer, self._parameters)
        parts = max(UNITS, -(-len(examples) // self.unit_examples))
        if len(examples) >= max(PROBE_EXAMPLES, UNITS * self.unit_examples if self._shares_statistics else 0):
            sums = self._sums(examples, parts, preconditioner)
            gradients = sums.mean
        else:
            gradients = self._sums(examples, -(-len(examples) // self.unit_examples), None).mean
            sums = self._probe(preconditioner)
        plain, preconditioned = sums.moments(self._population)
        if plain is not None:
            self.plain.append((step, plain))
        if preconditioned is not None:
            self.preconditioned.append((step, preconditioned))
        return gradients

    def _probe(self, preconditioner: list[Tensor] | None) -> GradientSums:
        wanted = max(PROBE_EXAMPLES, UNITS * self.unit_examples)
        size = min(wanted, self._workload.training_examples)
        chosen = self._probes.choice(self._workload.training_examples, size, replace=False, shuffle=False)
        with preserved_random_state():
            return self._sums(chosen.tolist(), -(-size // self.unit_examples), preconditioner)

    def _sums(self, examples: list[int], parts: int, preconditioner: list[Tensor] | None) -> GradientSums:
        sums = GradientSums(preconditioner)
        for part in split(range(len(examples)), min(parts, len(examples))):
            batch = to_device(self._fetch(examples[part.start : part.stop]), self._workload.device)
            loss = self._workload.task.loss(self._model, batch).mean()
            gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
            sums.add(gradients, len(part))
        return sums

    def _update(self, step: int, gradients: list[Tensor]) -> bool:
        job = self._workload.sweep.job
        norm = math.sqrt(squared_norm(gradients, None))
        if not math.isfinite(norm):
            return False
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        steps_per_epoch = self._workload.training_examples / self._trial.batch_size
        warmup = 0.0 if self._trial.origin else job.schedule.warmup(steps_per_epoch)
        set_rate_(self._optimizer, self._trial.learning_rate * self._rule() * min(1.0, step / max(1.0, warmup)))
        if job.optimizer.gradient_clip_norm is not None:
            clip_(self._optimizer, self._parameters, norm, job.optimizer.gradient_clip_norm)
        self._optimizer.step()
        return True

    def _rule(self) -> float:
        """1/(1 + B/b) with the latest noise scale where the sweep asks for that, else 1."""
        if self._workload.sweep.section.learning_rate_rule == "constant":
            return 1.0
        latest = [moments for _, moments in self.plain[-RULE_WINDOW:]]
        trace = sum(moments.variance_trace for moments in latest)
        squared = max(sum(moments.squared_norm for moments in latest), 0.0)
        whole = squared + trace / self._trial.batch_size
        return squared / whole if whole > 0 else 1.0


def stream(examples: int, seed: int, batch_size: int) -> Iterator[list[int]]:
    """Batches of one size from a training run's order of the data, epoch after epoch without a short one between.

    A short batch at the end of each epoch would count for a full one in steps: with 1,472 examples and 1,024 a
    step the mean batch would be 736.
    """
    waiting: list[int] = []
    for epoch in itertools.count():
        plan = BatchPlan(examples, batch_size, batch_size, 1, seed)
        waiting += plan.order(epoch).tolist()
        whole = len(waiting) - len(waiting) % batch_size
        for start in range(0, whole, batch_size):
            yield waiting[start : start + batch_size]
        waiting = waiting[whole:]
