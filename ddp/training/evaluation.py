"""Loss and metrics over a data set at fixed weights, shared out over the ranks.

Every example counts once, whatever the batch and the number of ranks: ranks add up values per example in
float64, and one collective at the end gives all of them the same means.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # the one base of all layers with running statistics
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.tasks.base import Batch, Task
from ddp.training.data import fetcher, split, to_device


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
) -> tuple[float, dict[str, float], int]:
    """Mean loss, mean of each metric and number of examples, identical on all ranks.

    Collective where world_size > 1. `model` is in evaluation mode meanwhile and its modes are restored;
    it must compute the same on all ranks, see `averaged_buffers`.
    """
    names = sorted(task.goals)
    size = len(dataset)  # type: ignore[arg-type]
    share = split(range(size), world_size)[rank]
    fetch = fetcher(dataset)
    sums = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(share), batch_size):
            batch = to_device(fetch(list(share[start : start + batch_size])), device)
            sums += _sums(task, model, batch, names)
    if world_size > 1:
        dist.all_reduce(sums, group=process_group)
    loss, *metrics, examples = sums.tolist()
    if examples != size:
        raise UsageError(f"evaluation: the task gave values for {examples:.0f} of {size} examples; one each is needed")
    means = {name: total / size for name, total in zip(names, metrics, strict=True)}
    return loss / size, means, size


def _sums(task: Task, model: nn.Module, batch: Batch, names: list[str]) -> Tensor:
    """Sums over the batch: loss, each metric, number of examples; float64."""
    losses = task.loss(model, batch)
    metrics = task.metrics(model, batch)
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
    statistics = _running_statistics(result)
    if world_size > 1 and statistics:
        flat = torch.cat([tensor.double().flatten() for tensor in statistics])
        dist.all_reduce(flat, group=process_group)
        flat /= world_size
        for tensor, mean in zip(statistics, flat.split([tensor.numel() for tensor in statistics]), strict=True):
            tensor.copy_(mean.view_as(tensor))
    return result


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the normalisation layers, without their counters."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    tensors = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
    return [tensor for tensor in tensors if tensor is not None]
