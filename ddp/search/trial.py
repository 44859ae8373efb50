"""One trial: a light training loop in one process, without ranks, run directory or checkpoints.

It follows the job in everything that the result depends on (task, optimizer, order of the data, mean over the
batch's examples, clipping, warm-up) and measures what a search wants to know: the training loss on a fixed subset
against the step, validation at the targets, time, memory, and the noise scale on the way.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.noise.moments import Moments
from ddp.search.curve import next_look, steps_to_targets, value_at
from ddp.search.gradient_noise import GradientSums, adam_preconditioner, average_noise_scale, squared_norm
from ddp.search.store import StoppedBecause, TrialMethod, TrialResult
from ddp.search.sweep_file import Sweep
from ddp.tasks import load_task
from ddp.tasks.base import Batch, Task
from ddp.topology import SINGLE_PROCESS
from ddp.training.data import BatchPlan, fetcher, split, to_device
from ddp.training.evaluation import evaluate, evaluation_mode
from ddp.training.optimizers import build_optimizer, clip_
from ddp.training.random_state import preserved_random_state, seed_rank
from ddp.training.resources import choose_device
from ddp.training.trainer import population

UNITS = 4  # separate gradients of a sample of the noise scale
PROBE_EXAMPLES = 64  # a sample has at least so many: at batch size 4 the step's own would say next to nothing
DIVERGED = 10.0  # times the first loss
RULE_WINDOW = 8  # samples that the learning-rate rule follows
SUBSET_SEED, PROBE_SEED = 1, 2  # beside the job's


@dataclass(frozen=True, slots=True)
class Trial:
    """A run to be made.

    Attributes:
        targets: losses to reach, falling; none for a run of `maximum_steps`.
        maximum_steps: the budget.
        hopeless_steps: after which a run that has not reached the last target cannot be the best any more; never
            below what the best known run took.
    """

    method: TrialMethod
    batch_size: int
    learning_rate: float
    seed: int
    targets: tuple[float, ...]
    maximum_steps: int
    hopeless_steps: float = math.inf

    @property
    def key(self) -> tuple[str, int, float, int]:
        return self.method, self.batch_size, self.learning_rate, self.seed


@dataclass(frozen=True, slots=True)
class Workload:
    """What the trials of a search share, loaded once a worker."""

    sweep: Sweep
    task: Task
    training: Dataset[Any]
    validation: Dataset[Any]
    device: torch.device

    @property
    def training_examples(self) -> int:
        return len(self.training)  # type: ignore[arg-type]


def load_workload(sweep: Sweep, *, allow_import: bool) -> Workload:
    """Build the task and its data.

    Raises:
        UsageError: the task or the device is not there, or a batch size is more than the training set.
    """
    device = choose_device(sweep.job.run.device, SINGLE_PROCESS)
    seed_rank(sweep.job.run.seed, 0)
    task = load_task(sweep.job.task, allow_import=allow_import)
    training, validation = task.datasets()
    workload = Workload(sweep, task, training, validation, device)
    largest = sweep.section.batch_sizes[-1]
    if max(largest, sweep.section.subset_examples) > workload.training_examples:
        raise UsageError(
            f"sweep.batch_sizes: {largest}, sweep.subset_examples: {sweep.section.subset_examples}: the training set "
            f"has {workload.training_examples} examples"
        )
    return workload


def run_trial(workload: Workload, trial: Trial) -> TrialResult:
    """Train until all targets are reached, the loss diverges, the budget is used up, or it is hopeless."""
    started = time.perf_counter()
    run = _Run(workload, trial)
    because, steps = run.to_the_end()
    reached = steps_to_targets(run.curve, trial.targets) if because != "diverged" else run.reached()
    job, batch_size = workload.sweep.job, trial.batch_size
    return TrialResult(
        optimizer=job.optimizer.name,
        batch_size=batch_size,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        method=trial.method,
        targets=trial.targets,
        steps_to_target=reached,
        examples_to_target=tuple(steps * batch_size for steps in reached),
        validation_loss_at_target=tuple(value_at(steps, run.validation_losses) for steps in reached),
        validation_metric_at_target=tuple(value_at(steps, run.validation_metrics) for steps in reached),
        seconds=time.perf_counter() - started,
        seconds_per_step=run.step.median_seconds(),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        diverged=because == "diverged",
        stopped_because=because,
        curve=tuple(run.curve),
        noise_plain=tuple(average_noise_scale(run.step.plain, steps, batch_size) for steps in reached),
        noise_preconditioned=tuple(
            average_noise_scale(run.step.preconditioned, steps, batch_size) for steps in reached
        ),
        steps=steps,
    )


class _Run:
    """The loop: steps, looks at the loss on the subset, and the decision to stop."""

    def __init__(self, workload: Workload, trial: Trial) -> None:
        job = workload.sweep.job
        self._workload, self._trial = workload, trial
        seed_rank(job.run.seed + trial.seed, 0)
        self._model = workload.task.model().to(workload.device)
        self.step = TrainingStep(workload, trial, self._model)
        self._subset = SubsetLoss(workload, self._model, self.step.unit_examples)
        self.curve: list[tuple[int, float]] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.validation_metrics: list[tuple[int, float]] = []

    def to_the_end(self) -> tuple[StoppedBecause, int]:
        """Why it stopped and after how many steps."""
        step, look, because = 0, 0, self._look(0)
        while because is None:
            look = min(next_look(look), self._trial.maximum_steps)
            while step < look:
                step += 1
                if not self.step.take(step):
                    return "diverged", step
            because = self._look(step)
        return because, step

    def reached(self) -> tuple[float, ...]:
        """Steps to each target as far as is known."""
        finite = [(step, loss) for step, loss in self.curve if math.isfinite(loss)]
        return steps_to_targets(finite, self._trial.targets)

    def _look(self, step: int) -> StoppedBecause | None:
        with preserved_random_state():
            loss = self._subset.loss()
        if loss <= 0:
            raise UsageError(f"task: the training loss is {loss:g} after step {step}; targets are for losses above 0")
        self.curve.append((step, loss))
        if not math.isfinite(loss) or loss > DIVERGED * self.curve[0][1]:
            return "diverged"
        if self._trial.targets and loss <= 1.25 * self._trial.targets[0]:
            self._validate_near_a_target(step, loss)
            if not any(map(math.isnan, self.reached())):
                return "targets"
        if step >= self._trial.maximum_steps:
            return "budget"
        return "hopeless" if step > self._trial.hopeless_steps else None

    def _validate_near_a_target(self, step: int, loss: float) -> None:
        """Looks around a crossing are enough: values at the target are read off between them."""
        if not any(0.85 * target <= loss <= 1.15 * target for target in self._trial.targets):
            return
        with preserved_random_state():
            mean, metrics, _ = evaluate(
                self._workload.task,
                self._model,
                self._workload.validation,
                rank=0,
                world_size=1,
                batch_size=self._workload.sweep.micro_batch_size,
                device=self._workload.device,
            )
        self.validation_losses.append((step, mean))
        metric = self._workload.sweep.job.evaluation.metric
        self.validation_metrics.append((step, {"loss": mean, **metrics}.get(metric, math.nan)))


class TrainingStep:
    """Takes steps with one model; samples the noise scale as often as the loss is looked at."""

    def __init__(self, workload: Workload, trial: Trial, model: nn.Module) -> None:
        job = workload.sweep.job
        self._workload, self._trial, self._model = workload, trial, model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        section = job.optimizer.model_copy(update={"learning_rate": trial.learning_rate})
        self._optimizer = build_optimizer(section, self._parameters)
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
            self._next_sample = next_look(step)
            gradients = self._sample(step, examples)
        else:
            largest = self.unit_examples if self._shares_statistics else self._workload.sweep.micro_batch_size
            gradients = self._sums(examples, -(-len(examples) // largest), None).mean
        finite = self._update(step, gradients)
        (self._sampled_seconds if sampling else self._seconds).append(time.perf_counter() - started)
        return finite

    def median_seconds(self) -> float:
        """Of the steps that sampled nothing, where there are some."""
        return statistics.median(self._seconds or self._sampled_seconds or [math.nan])

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
        for group in self._optimizer.param_groups:
            group["lr"] = self._trial.learning_rate * self._rule() * min(1.0, step / max(1, job.schedule.warmup_steps))
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


class SubsetLoss:
    """The training loss on a fixed part of the training set, at the present weights.

    Normalisation layers take the statistics of the batch, as in training, in micro-batches of training's size: their
    running ones lag behind, most where steps are few and large. They are computed anew on the way, for the
    validation that may follow (Wu and Johnson 2021, arXiv:2105.07576).
    """

    def __init__(self, workload: Workload, model: nn.Module, unit_examples: int) -> None:
        seed = (workload.sweep.job.run.seed, SUBSET_SEED)
        order = np.random.default_rng(seed).permutation(workload.training_examples)
        chosen = np.sort(order[: workload.sweep.section.subset_examples]).tolist()
        self._task, self._model, self._examples = workload.task, model, len(chosen)
        self._layers = normalisation_layers(model)
        fetch = fetcher(workload.training)
        parts = -(-len(chosen) // (unit_examples if self._layers else workload.sweep.micro_batch_size))
        self._batches: list[Batch] = [
            to_device(fetch(chosen[part.start : part.stop]), workload.device)
            for part in split(range(len(chosen)), parts)
        ]

    def loss(self) -> float:
        """Mean over the subset's examples."""
        with evaluation_mode(self._model), _counting_anew(self._layers), torch.no_grad():
            sums = [self._task.loss(self._model, batch).sum(dtype=torch.float64) for batch in self._batches]
        return float(torch.stack(sums).sum()) / self._examples


def normalisation_layers(model: nn.Module) -> list[_NormBase]:
    """Those that use the statistics of the batch in training."""
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


@contextmanager
def _counting_anew(layers: list[_NormBase]) -> Iterator[None]:
    """Layers in training mode, whose running statistics become plain averages over what passes meanwhile."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


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
