"""A task that costs nothing to load, for jobs on nodes: regression with a network of some 30,000 parameters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp.tasks.base import Goal, TensorExamples

INPUTS, WIDTH, EXAMPLES = 37, 151, 203


class Task:
    """Options: `file` is written by rank 0 in its `step`-th forward of training; each takes `seconds`."""

    goals: Mapping[str, Goal] = {"error": "min"}

    def __init__(self, file: str = "", step: int = -1, seconds: float = 0.0) -> None:
        self.file, self.step, self.seconds, self.count = file, step, seconds, 0

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
        )

    def datasets(self) -> tuple[Dataset[tuple[Tensor, ...]], Dataset[tuple[Tensor, ...]]]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(EXAMPLES, INPUTS, generator=generator)
        data = TensorExamples(inputs, inputs.sum(dim=1) + torch.randn(EXAMPLES, generator=generator))
        return data, data

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self._count_forward()
        inputs, targets = batch
        return (model(inputs)[:, 0] - targets).square()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"error": (model(batch[0])[:, 0] - batch[1]).abs()}

    def _count_forward(self) -> None:
        self.count += 1
        time.sleep(self.seconds)
        if self.file and self.count == self.step and dist.get_rank() == 0:
            Path(self.file).touch()
