"""A training set without end: points of two spirals, made as they are asked for, in a part of its own on each rank.

From the repository's root:

    torchrun --nproc-per-node 2 -m ddp train --allow-import examples examples/streaming_task.toml

Only `__iter__` is needed. `shard` gives each rank its own part to read, without which all ranks read everything and take
their share of it; `state_dict` and `load_state_dict` let a resumed run go on at once, without which it reads over what
was there before. With `examples_per_epoch` an epoch has an end, and run.epochs may be given in place of run.steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import IterableDataset

from ddp.tasks.base import Goal, TensorExamples

BLOCK = 32  # points that one seed makes


class Points(IterableDataset[tuple[Tensor, Tensor]]):
    """The blocks `index`, `index + num_shards`, ... of a stream that no machine would hold."""

    def __init__(self, noise: float, num_shards: int = 1, index: int = 0) -> None:
        self.noise, self.num_shards, self.index = noise, num_shards, index
        self.taken = 0  # points of this part, so far

    def shard(self, num_shards: int, index: int) -> Points:
        return Points(self.noise, num_shards, index)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            block, first = divmod(self.taken, BLOCK)
            points, labels = spirals(BLOCK, self.index + block * self.num_shards, self.noise)
            for point in zip(points[first:], labels[first:], strict=True):
                self.taken += 1
                yield point


class EndlessSpirals:
    """Which spiral does a point lie on? Batches are (points (n, 2), labels (n,) of 0.0 or 1.0)."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def __init__(self, noise: float = 0.03, width: int = 64) -> None:
        self.noise, self.width = noise, width

    def model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def datasets(self) -> tuple[Points, TensorExamples]:
        return Points(self.noise), TensorExamples(*spirals(500, -1, self.noise))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, labels = batch
        return binary_cross_entropy_with_logits(model(points).squeeze(1), labels, reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        points, labels = batch
        return {"accuracy": (model(points).squeeze(1) > 0) == (labels > 0.5)}


def spirals(count: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Points (count, 2) and labels (count,): the same for the same seed, whatever else is drawn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    radius = torch.rand(count, generator=generator).sqrt()
    angle = 3 * math.pi * radius + math.pi * labels
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return points + noise * torch.randn(count, 2, generator=generator), labels.float()
