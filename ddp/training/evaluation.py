"""Loss and metrics over a data set at fixed weights, shared out over the ranks.

Every example counts once, whatever the batch and the number of ranks: ranks add up values per example in
float64, and one collective at the end gives all of them the same means. About once a second they agree whether
a signal came: an evaluation may take longer than a launcher waits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # the one base of all layers with running statistics
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.tasks.base import Batch, Task, loss_and_metrics_of
from ddp.telemetry.records import AVERAGED, EvaluationRecord
from ddp.training.data import fetcher, split, to_device
from ddp.training.random_state import preserved_random_state

AGREEMENT_SECONDS = 1.0  # between two looks whether a signal came


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over one data set; the same on all ranks.

    Attributes:
        loss: mean over the examples.
        metrics: likewise, by name.
    """

    loss: float
    metrics: Mapping[str, float]
    examples: int


@dataclass(frozen=True, slots=True)
class Splits:
    """The data sets of a run. `training_sample` is as large as the validation set and fixed, for evaluation."""

    training: Dataset[Any]
    validation: Dataset[Any]
    training_sample: Dataset[Any]


def evaluate_splits(
    task: Task,
    module: nn.Module,
    splits: Splits,
    *,
    step: int,
    epoch: float,
    world_size: int,
    averaged: nn.Module | None = None,
    penalty: float = 0.0,
    **how: Any,
) -> list[EvaluationRecord] | None:
    """Training sample and validation set, the latter last; None where a rank was asked to stop meanwhile.

    Where there are `averaged` weights, the validation set comes with them, too, before the raw ones.

    Running statistics are averaged over the ranks in a copy, and random generators go on as if nothing had been drawn.
    Collective where world_size > 1.

    Args:
        penalty: what weight decay adds to the loss, see `EvaluationRecord`.
        how: the further arguments of `evaluate`.
    """
    wanted = [("training", splits.training_sample, module), ("validation", splits.validation, module)]
    if averaged is not None:
        wanted.insert(1, (f"validation{AVERAGED}", splits.validation, averaged))
    records: list[EvaluationRecord] = []
    with preserved_random_state():
        for split, dataset, source in wanted:
            model = averaged_buffers(source, world_size=world_size)
            found = evaluate(task, model, dataset, world_size=world_size, **how)
            if found is None:
                return None
            values = (found.examples, found.loss, found.metrics, penalty if source is module else 0.0)
            records.append(EvaluationRecord(step, epoch, time.time(), split, *values))
    return records


def evaluate(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    device: torch.device,
    process_group: dist.ProcessGroup | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Evaluation | None:
    """Evaluate `model` on `dataset`; None where a rank was asked to stop meanwhile.

    Collective where world_size > 1. `model` is in evaluation mode meanwhile and its modes are restored;
    it must compute the same on all ranks, see `averaged_buffers`.

    Args:
        forward_context: what each forward runs in, the run's precision for example.
    """
    names = sorted(task.goals)
    size = len(dataset)  # type: ignore[arg-type]
    shares = split(range(size), world_size)
    fetch, share = fetcher(dataset), shares[rank]
    sums = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
    pace = _Pace(world_size, process_group, asked_to_stop)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, max(map(len, shares)), batch_size):
            indices = list(share[start : start + batch_size])
            if indices:
                with forward_context():
                    sums += _sums(task, model, to_device(fetch(indices), device), names)
            if pace.stops_here():
                return None
    if world_size > 1:
        dist.all_reduce(sums, group=process_group)
    loss, *metrics, examples = sums.tolist()
    if examples != size:
        raise UsageError(f"evaluation: the task gave values for {examples:.0f} of {size} examples; one each is needed")
    means = {name: total / size for name, total in zip(names, metrics, strict=True)}
    return Evaluation(loss / size, means, size)


class _Pace:
    """Which batches the ranks meet after: the first, and then as many apart as the slowest takes a second for."""

    def __init__(self, world_size: int, process_group: dist.ProcessGroup | None, asked: Callable[[], bool]) -> None:
        self._world_size, self._process_group, self._asked = world_size, process_group, asked
        self._batches, self._until_next = 0, 1  # since the last meeting, and until the next one
        self._began = time.monotonic()

    def stops_here(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it after each of their batches. Collective now and then."""
        self._batches += 1
        if self._batches < self._until_next:
            return False
        says = torch.tensor([float(self._asked()), (time.monotonic() - self._began) / self._batches])
        if self._world_size > 1:
            dist.all_reduce(says, dist.ReduceOp.MAX, group=self._process_group)
        asked, batch_seconds = says.tolist()
        self._batches, self._until_next = 0, max(1, int(AGREEMENT_SECONDS / max(batch_seconds, 1e-6)))
        self._began = time.monotonic()
        return bool(asked)


def _sums(task: Task, model: nn.Module, batch: Batch, names: list[str]) -> Tensor:
    """Sums over the batch: loss, each metric, number of examples; float64."""
    both = loss_and_metrics_of(task)
    losses, metrics = both(model, batch) if both is not None else (task.loss(model, batch), task.metrics(model, batch))
    _check_values(losses, metrics, names)
    sums = [losses.double().sum(), *(metrics[name].double().sum() for name in names)]
    return torch.stack([*sums, sums[0].new_tensor(len(losses))])


def _check_values(losses: Tensor, metrics: Mapping[str, Tensor], names: list[str]) -> None:
    if sorted(metrics) != names:
        raise UsageError(f"task: metrics gave {', '.join(sorted(metrics))}, but goals names {', '.join(names)}")
    for name, values in {"loss": losses, **metrics}.items():
        if values.dim() != 1 or len(values) != len(losses):
            shape = tuple(values.shape)
            raise UsageError(f"task: {name} has the shape {shape}; one value for each example is needed, (examples,)")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module gets its own mode back, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def averaged_buffers(model: nn.Module, *, world_size: int, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """A copy for evaluation whose running statistics are the means over the ranks.

    Collective where world_size > 1. Parameters are shared with `model`, buffers are the copy's own, so that
    in training each rank keeps its statistics. `model` is the plain module, not DDP's wrapper.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, memo=cast("dict[int, Any]", shared))
    statistics = running_statistics(result)
    if world_size > 1 and statistics:
        flat = torch.cat([tensor.double().flatten() for tensor in statistics])
        dist.all_reduce(flat, group=process_group)
        flat /= world_size
        for tensor, mean in zip(statistics, flat.split([tensor.numel() for tensor in statistics]), strict=True):
            tensor.copy_(mean.view_as(tensor))
    return result


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the normalisation layers, without their counters."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    tensors = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
    return [tensor for tensor in tensors if tensor is not None]
