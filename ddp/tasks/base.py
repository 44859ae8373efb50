"""What a task fills in to be trained, and the data set that most tasks need.

A batch is whatever the data set's `collate` makes of several examples: a tensor, or a tuple or a
dictionary of tensors, whose first dimension is the examples.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp.errors import UsageError

Batch = Any
Goal = Literal["max", "min"]  # which way a metric gets better


class Task(Protocol):
    """A model, its data, a loss and metrics. Built once per rank, after the seed is set."""

    goals: Mapping[str, Goal]
    """Every metric that `metrics` returns, with the direction that is better: `{"accuracy": "max"}`.

    Read-only by convention. "loss" ("min") is known without being listed.
    """

    def model(self) -> nn.Module:
        """A fresh model on the CPU; initialised from torch's global generator."""
        ...

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Training and validation sets: `len` and `[i]`; `__getitems__` and `collate` where present are used.

        Either may have columns, as HuggingFace's have, or be an iterable instead: a training set is then a stream (see
        `ddp.training.stream`), whose `shard`, `state_dict`, `load_state_dict`, `set_epoch` and `examples_per_epoch` where
        present are used; a validation set is kept in memory. Sampling by class asks `labels(dataset)`, a method that a
        task may have, for one integer an example; see `ddp.training.labels` for where else they are looked for.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each example, shape (examples,), differentiable. Calls `model` exactly once."""
        ...

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Values of each example, shape (examples,), under `torch.no_grad`; their means are reported."""
        ...


LossAndMetrics = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Tensor]]]


def loss_and_metrics_of(task: Task) -> LossAndMetrics | None:
    """The task's `loss_and_metrics(model, batch)`, which gives what `loss` and `metrics` give from one forward.

    A task need not have it. With it, training tells the metric of each step, and evaluations take half the time.
    """
    return getattr(task, "loss_and_metrics", None)


ClassDimension = int | Literal["binary"] | None


def class_dimension_of(task: Task) -> ClassDimension:
    """The task's `class_dimension`: along which dimension of its model's outputs the logits of classes lie.

    "binary" where each output is the logit of one yes or no. A task need not have it; one without has outputs that are plain
    values, as in regression. An ensemble takes the mean of probabilities with it, and of outputs without.
    """
    return getattr(task, "class_dimension", None)


def metric_goal(task: Task, metric: str, key: str = "evaluation.metric") -> Goal:
    """The direction in which `metric` gets better; "loss" is always known, and "min".

    Raises:
        UsageError: the task has no such metric; the text speaks of `key` of the job.
    """
    goals: dict[str, Goal] = {**task.goals, "loss": "min"}
    if metric not in goals:
        close = difflib.get_close_matches(metric, goals, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"{key}: the task has no metric {metric!r}{hint}; valid: {', '.join(goals)}")
    return goals[metric]


class TensorExamples(Dataset[tuple[Tensor, ...]]):
    """Examples held in memory: tensors of equal length, indexed together, a batch by one gather."""

    def __init__(self, *tensors: Tensor) -> None:
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"the tensors hold different numbers of examples: {sorted(lengths)}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        rows = torch.as_tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)

    @staticmethod
    def collate(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return batch
