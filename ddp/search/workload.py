"""What the trials of a search share: the task and its data, loaded once a worker, and the fixed part that is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.job import Job, OptimizerSection
from ddp.search.sweep_file import Sweep
from ddp.tasks import load_task
from ddp.tasks.base import Batch, Task, metric_goal
from ddp.topology import SINGLE_PROCESS
from ddp.training.data import fetcher, split, to_device
from ddp.training.evaluation import evaluation_mode
from ddp.training.initialisation import initialise_, load_weights_
from ddp.training.optimizers import build_optimizer
from ddp.training.random_state import seed_rank
from ddp.training.resources import choose_device
from ddp.training.stream import is_stream

SUBSET_SEED = 1  # beside the job's


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


def load_workload(sweep: Sweep, *, allow_import: Sequence[str] = ()) -> Workload:
    """Build the task and its data.

    Raises:
        UsageError: the task or the device is not there, a batch size is more than the training set, or the job asks for what
            trials do not have.
    """
    device = choose_device(sweep.job.run.device, SINGLE_PROCESS)
    seed_rank(sweep.job.run.seed, 0)
    task = load_task(sweep.job.task, allow_import=allow_import)
    training, validation = task.datasets()
    if is_stream(training):
        raise UsageError(
            "critical-batch draws examples of the training set by number, which a stream does not have: name a task whose data "
            "set has a length"
        )
    _check_steps(sweep.job)
    metric_goal(task, sweep.job.evaluation.metric)
    workload = Workload(sweep, task, training, validation, device)
    largest = sweep.section.batch_sizes[-1]
    if max(largest, sweep.section.subset_examples) > workload.training_examples:
        raise UsageError(
            f"sweep.batch_sizes: {largest}, sweep.subset_examples: {sweep.section.subset_examples}: the training set "
            f"has {workload.training_examples} examples"
        )
    return workload


def _check_steps(job: Job) -> None:
    """What a trial's steps would pass over in silence is refused: the answer would be another training's."""
    passed_over = {
        "sampling.name": job.sampling.name != "uniform",
        "optimizer.sam_rho": job.optimizer.sam_rho is not None,
        "optimizer.final_momentum": job.optimizer.final_momentum is not None,
    }
    if keys := ", ".join(key for key, is_given in passed_over.items() if is_given):
        raise UsageError(
            f"critical-batch takes plain steps, of one momentum, each example once an epoch: leave out {keys}"
        )


def make_model(workload: Workload, seed: int) -> nn.Module:
    """The task's, with the weights that the job begins with, on the CPU; `seed` is for those drawn by [initialisation].

    Raises:
        UsageError: the job's [initialisation] does not fit it.
    """
    job, model = workload.sweep.job, workload.task.model()
    initialise_(model, job.initialisation, seed)
    load_weights_(model, job.initialisation)
    return model


def rehearse(model: nn.Module, section: OptimizerSection) -> None:
    """Step an optimizer on `model` once: torch then imports what it puts off, 2 s that each fork would pay.

    No backward, whose threads a fork would not have.
    """
    optimizer = build_optimizer(section, model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()


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
    """Those that use the statistics of the batch in training; frozen ones, in evaluation mode meanwhile, do not."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    return [layer for layer in layers if layer.running_mean is not None]


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
