"""What is known of a run before anything is opened: its task, its data dealt out, how long it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ddp.training.data import OPEN, BatchPlan
from ddp.training.evaluation import Splits
from ddp.training.finite import finite, sample_of_stream
from ddp.training.initialisation import initialise_
from ddp.training.labels import labels_of
from ddp.training.sampling import Sampler, Uniform, build_sampler
from ddp.training.stream import Stream, declared_examples, is_stream


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


def plan_run(job: Job, world_size: int, rank: int, *, allow_import: Sequence[str] = ()) -> Plan:
    """Load the task and lay out its data; a UsageError where the job does not fit them.

    Args:
        rank: reads its part of a training set that is a stream.
    """
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
    validation = finite(validation)
    if is_stream(training):
        batches = _dealt(job, world_size, _stream_length(job, task, training))
        sampler, stream = Uniform(), _stream(job, training, rank, world_size)
        sample = sample_of_stream(training, size_of(validation))
    else:
        batches = _dealt(job, world_size, size_of(training))
        sampler, stream = _sampler(job, batches, task, training), None
        sample = _sample(training, size_of(validation))
    course = begin_course(
        *(job, batches),
        batch_statistics=has_batch_statistics(module),
        goal=goal if job.schedule.metric is None else metric_goal(task, job.schedule.metric, "schedule.metric"),
        sampler=sampler,
        stream=stream,
    )
    splits = Splits(training, validation, sample)
    return Plan(task, module, splits, course, goal, stopping_goal if stopping.mode == "auto" else stopping.mode)


def size_of(dataset: Dataset[Any]) -> int:
    size = len(dataset)  # type: ignore[arg-type]
    if size < 1:
        raise UsageError("task: a data set has no examples")
    return size


def _dealt(job: Job, world_size: int, examples: int) -> BatchPlan:
    batch = job.batch
    global_batch_size, micro_batch_size = batch.examples_per_step(world_size), batch.examples_at_once(world_size)
    in_step = job.normalisation.sync_batch_norm and world_size > 1
    batches = BatchPlan(examples, global_batch_size, micro_batch_size, world_size, job.run.seed, in_step)
    if global_batch_size > examples:
        raise UsageError(
            f"batch.global_batch_size: {global_batch_size:,} examples a step are more than the training set's {examples:,}"
        )
    return batches


def _sampler(job: Job, batches: BatchPlan, task: Task, training: Dataset[Any]) -> Sampler:
    if job.sampling.shuffle_buffer:
        raise UsageError(
            "sampling.shuffle_buffer is for a training set that is a stream; this one is shuffled as a whole: leave it out"
        )
    needs_labels = job.sampling.name == "class_balanced"
    return build_sampler(job.sampling, batches, labels_of(task, training, batches.examples) if needs_labels else None)


def _stream_length(job: Job, task: Task, training: Dataset[Any]) -> int:
    examples = declared_examples(task, training)
    if examples == OPEN and job.run.steps is None:
        raise UsageError(
            "run.epochs: the training set is a stream that does not say how many examples an epoch has: give run.steps "
            "instead, or the data set (or the task) an attribute examples_per_epoch"
        )
    if examples == OPEN and (in_epochs := _keys_in_epochs(job)):
        raise UsageError(
            f"{in_epochs[0]}: the training set is a stream that does not say how many examples an epoch has: count in steps, or "
            "give the data set (or the task) an attribute examples_per_epoch"
        )
    if examples == OPEN and job.batch.adapts and job.batch.largest is None:
        raise UsageError(
            "batch.largest: the training set is a stream of unknown length, of which no share can be the limit: give one"
        )
    return examples


def _keys_in_epochs(job: Job) -> list[str]:
    """Of the rate's and the momentum's schedule, as far as they are given."""
    sections = {"schedule": job.schedule.model_dump(), "optimizer": job.optimizer.model_dump()}
    return [
        f"{section}.{key}"
        for section, values in sections.items()
        for key, value in values.items()
        if key.endswith("epochs") and value is not None
    ]


def _stream(job: Job, training: Dataset[Any], rank: int, world_size: int) -> Stream:
    if isinstance(training, Iterator) and type(training).__module__ in ("builtins", "itertools"):
        raise UsageError(
            f"task: the training set is a {type(training).__name__}, which can be read only once: give an object whose __iter__ "
            "begins anew each time, such as an IterableDataset"
        )
    if job.data.workers:
        raise UsageError(
            "data.workers: a training set that is a stream is read by each rank itself: leave data.workers out, or set it "
            "to 0"
        )
    if job.sampling.name != "uniform":
        raise UsageError(
            f'sampling.name: "{job.sampling.name}" chooses examples by number, which the training set, a stream, does not '
            "have: leave it out"
        )
    return Stream(training, rank, world_size, seed=job.run.seed, shuffle_buffer=job.sampling.shuffle_buffer)


def _sample(dataset: Dataset[Any], size: int) -> Dataset[Any]:
    """A fixed random sample for evaluation."""
    chosen = np.random.default_rng(0).permutation(size_of(dataset))[:size]
    return Subset(dataset, [int(index) for index in sorted(chosen)])
