"""A task of your own: the points of two interleaved spirals, told apart by a small perceptron.

From the repository's root:

    torchrun --nproc-per-node 2 -m ddp train --allow-import examples examples/custom_task.toml

The job file's `options` arrive as the keyword arguments of `Spirals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ddp.tasks.base import Goal, TensorExamples


class Spirals:
    """Which spiral does a point lie on? Batches are (points (n, 2), labels (n,) of 0.0 or 1.0)."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}
    class_dimension = "binary"  # for `ddp ensemble`: the output is the logit of one yes or no

    def __init__(self, turns: float = 1.5, noise: float = 0.05, examples: int = 2000, width: int = 64) -> None:
        self.turns = turns
        self.noise = noise
        self.examples = examples
        self.width = width

    def model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        return self._points(self.examples, seed=0), self._points(self.examples // 4, seed=1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, labels = batch
        return binary_cross_entropy_with_logits(model(points).squeeze(1), labels, reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        points, labels = batch
        return {"accuracy": (model(points).squeeze(1) > 0) == (labels > 0.5)}

    def _points(self, examples: int, seed: int) -> TensorExamples:
        """Every rank draws the same points: the generator is seeded here, not by the run."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(examples) % 2
        radius = torch.rand(examples, generator=generator).sqrt()
        angle = 2 * math.pi * self.turns * radius + math.pi * labels
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return TensorExamples(points + self.noise * torch.randn(examples, 2, generator=generator), labels.float())
