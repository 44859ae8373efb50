"""The loss at many points around a network's weights, dealt out over the ranks.

Ranks share out points, not examples: a point is computed by one rank on the same batches whatever the number of ranks, so
the surface is the same in every bit, and one collective at the end hands all of it to all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ddp.tasks.base import Batch
from ddp.trained import Trained
from ddp.training.agreement import stop_together
from ddp.training.data import fetcher, split, to_device
from ddp.training.place import Place
from ddp.training.plan import size_of
from ddp.training.precision import autocast
from ddp.training.random_state import preserved_random_state, seed_rank

COMMAND = "landscape"
BATCH_SIZE = 256


@dataclass(frozen=True, slots=True)
class Examples:
    """Fixed examples on the device, and how many there are."""

    batches: Sequence[Batch]
    count: int


def fixed_examples(trained: Trained, dataset: Any, most: int, device: torch.device) -> Examples:
    """Up to `most` of a data set, evenly spread: the same ones, and as its own draws make them, on every rank."""
    size = size_of(dataset)
    indices = sorted({int(each) for each in np.linspace(0, size - 1, min(size, most))})
    fetch = fetcher(dataset)
    with preserved_random_state():
        seed_rank(trained.job.run.seed, 0)
        parts = [part for part in split(range(len(indices)), -(-len(indices) // BATCH_SIZE)) if len(part)]
        batches = [to_device(fetch([indices[at] for at in part]), device) for part in parts]
    return Examples(batches, len(indices))


def losses_at(
    place: Place, trained: Trained, examples: Examples, points: Sequence[Callable[[], Sequence[Tensor]]]
) -> NDArray[np.float64]:
    """The mean loss at each point, (points,), in evaluation mode; the network is left as it was. Collective.

    Args:
        points: each gives the offset from the trained weights, a tensor for each parameter.

    Raises:
        StoppedError: a rank was asked to stop; on all of them.
    """
    rank, world_size = place.topology.rank, place.topology.world_size
    values = torch.zeros(len(points), dtype=torch.float64)
    module = trained.module
    with kept(module) as weights, torch.no_grad():
        for first in range(0, len(points), world_size):
            if first + rank < len(points):
                _move_(module, weights, points[first + rank]())
                values[first + rank] = mean_loss(place, trained, examples)
            stop_together(place.stop.asked, COMMAND)
    if world_size > 1:
        dist.all_reduce(values)
    return values.numpy()


def mean_loss(place: Place, trained: Trained, examples: Examples) -> float:
    """At the weights that the network has now; NaN where this rank was asked to stop meanwhile."""
    total = 0.0
    for batch in examples.batches:
        if place.stop.asked:
            return math.nan
        with autocast(trained.job.precision, place.device):
            losses = trained.plan.task.loss(trained.module, batch)
        total += float(losses.double().sum())
    return total / examples.count


@contextmanager
def kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """A copy of the weights, which come back in the end."""
    weights = [each.detach().clone() for each in module.parameters()]
    try:
        yield weights
    finally:
        with torch.no_grad():
            for parameter, weight in zip(module.parameters(), weights, strict=True):
                parameter.copy_(weight)


def _move_(module: nn.Module, weights: Sequence[Tensor], offset: Sequence[Tensor]) -> None:
    for parameter, weight, part in zip(module.parameters(), weights, offset, strict=True):
        parameter.copy_(weight + part)
