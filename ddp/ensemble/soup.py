"""The mean of several networks' weights as one network (Izmailov et al. 2018, stochastic weight averaging).

Running statistics of normalisation layers belong to no such mean: they are taken anew over the training data, as
torch.optim.swa_utils.update_bn does. The batches are the same whatever the number of ranks, which share them out, and so
are the statistics, to rounding. Dropout stays off, as it will be where they are used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.training.agreement import stop_together
from ddp.training.data import fetcher, split, to_device
from ddp.training.initialisation import stays_in_evaluation
from ddp.training.plan import size_of


def average_of(modules: Sequence[nn.Module], weights: Sequence[float], names: Sequence[str]) -> nn.Module:
    """A copy of the first with the weighted mean of all parameters, taken in float64; other buffers are the first's.

    Raises:
        UsageError: they are not of one architecture.
    """
    shapes = [{name: each.shape for name, each in module.named_parameters()} for module in modules]
    for name, each in zip(names, shapes, strict=True):
        if each != shapes[0]:
            raise UsageError(f"--average-weights: {names[0]} and {name} are networks of different shapes")
    result = copy.deepcopy(modules[0])
    parameters = [dict(module.named_parameters()) for module in modules]
    with torch.no_grad():
        for name, target in result.named_parameters():
            terms = (weight * each[name].double() for weight, each in zip(weights, parameters, strict=True))
            target.copy_(sum(terms, torch.zeros_like(target, dtype=torch.float64)) / sum(weights))
    return result


def recompute_statistics(
    module: nn.Module,
    forward: Callable[[Any], object],
    dataset: Dataset[Any],
    *,
    batch_size: int,
    device: torch.device,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Running means and variances become plain means of those of the batches of one pass; frozen layers keep theirs. Collective.

    Args:
        forward: calls `module` on a batch.

    Raises:
        StoppedError: a rank was asked to stop; on all of them.
    """
    layers = [
        each
        for each in module.modules()
        if isinstance(each, _NormBase) and each.track_running_stats and not stays_in_evaluation(each)
    ]
    if not layers:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = size_of(dataset)
    order, fetch = np.random.default_rng(0).permutation(size), fetcher(dataset)
    batches = split(range(size), max(1, size // batch_size))
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean
        layer.train()
    try:
        with torch.no_grad():
            for first in range(0, len(batches), world_size):
                if first + rank < len(batches):
                    rows = batches[first + rank]
                    forward(to_device(fetch(order[rows.start : rows.stop].tolist()), device))
                stop_together(asked_to_stop(), "ensemble")
        _average_over_ranks(layers, count=len(range(rank, len(batches), world_size)))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        module.eval()


def _average_over_ranks(layers: Sequence[_NormBase], count: int) -> None:
    """Each rank's means are of `count` batches."""
    tensors = [each for layer in layers for each in (layer.running_mean, layer.running_var) if each is not None]
    flat = torch.cat([*(tensor.double().flatten() * count for tensor in tensors), _as_vector(count, tensors[0])])
    dist.all_reduce(flat)
    total = float(flat[-1])
    for tensor, mean in zip(tensors, (flat[:-1] / total).split([each.numel() for each in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
    for layer in layers:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(int(total))


def _as_vector(count: int, like: Tensor) -> Tensor:
    return torch.tensor([float(count)], dtype=torch.float64, device=like.device)
