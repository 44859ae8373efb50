"""What is known of a run before anything is opened: its task, its data dealt out, how long it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from ddp.errors import UsageError
from ddp.job import Job
from ddp.metering.measurement import has_batch_statistics
from ddp.tasks import load_task
from ddp.tasks.base import Goal, Task, metric_goal
from ddp.training.course import Course, begin_course
from ddp.training.data import BatchPlan
from ddp.training.evaluation import Splits
from ddp.training.initialisation import initialise_


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can be begun; the same on every rank."""

    task: Task
    module: nn.Module
    splits: Splits
    course: Course
    goal: Goal  # of evaluation.metric
    stopping_goal: Goal  # of early_stopping.monitor

    @property
    def batches(self) -> BatchPlan:
        """As the run begins."""
        return self.course.plan


def plan_run(job: Job, world_size: int, *, allow_import: Sequence[str] = ()) -> Plan:
    """Load the task and lay out its data; a UsageError where the job does not fit them."""
    torch.manual_seed(job.run.seed)
    task = load_task(job.task, allow_import=allow_import)
    torch.manual_seed(job.run.seed)  # whatever building the task drew
    module = task.model()
    initialise_(module, job.initialisation, job.run.seed)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        frozen = "with what initialisation.freeze names " if job.initialisation.freeze else ""
        raise UsageError(f"task: {frozen}the model has no parameter that takes a gradient: nothing to train")
    goal = metric_goal(task, job.evaluation.metric)
    stopping = job.early_stopping
    stopping_goal = metric_goal(task, stopping.monitor, "early_stopping.monitor")
    training, validation = task.datasets()
    batch = job.batch
    global_batch_size, micro_batch_size = batch.examples_per_step(world_size), batch.examples_at_once(world_size)
    batches = BatchPlan(size_of(training), global_batch_size, micro_batch_size, world_size, job.run.seed)
    if global_batch_size > batches.examples:
        raise UsageError(
            f"batch.global_batch_size: {global_batch_size:,} examples a step are more than the training set's "
            f"{batches.examples:,}"
        )
    splits = Splits(training, validation, _sample(training, size_of(validation)))
    course = begin_course(
        *(job, batches),
        batch_statistics=has_batch_statistics(module),
        goal=goal if job.schedule.metric is None else metric_goal(task, job.schedule.metric, "schedule.metric"),
    )
    return Plan(task, module, splits, course, goal, stopping_goal if stopping.mode == "auto" else stopping.mode)


def size_of(dataset: Dataset[Any]) -> int:
    size = len(dataset)  # type: ignore[arg-type]
    if size < 1:
        raise UsageError("task: a data set has no examples")
    return size


def _sample(dataset: Dataset[Any], size: int) -> Dataset[Any]:
    """A fixed random sample for evaluation, with the data set's own way of making a batch."""
    chosen = np.random.default_rng(0).permutation(size_of(dataset))[:size]
    sample = Subset(dataset, [int(index) for index in sorted(chosen)])
    if hasattr(dataset, "collate"):
        sample.collate = dataset.collate  # type: ignore[attr-defined]
    return sample
