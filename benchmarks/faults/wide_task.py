"""A task for what a save costs: an MLP of 25 M parameters, as in benchmarks/train_step.py, or one of any width."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddp.tasks.base import Goal, TensorExamples


class Task:
    """Classification of noise; `width` 2048 with 5 hidden layers has 25 M parameters."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def __init__(self, inputs: int, width: int, outputs: int, hidden: int, examples: int) -> None:
        self.inputs, self.width, self.outputs, self.hidden, self.examples = inputs, width, outputs, hidden, examples

    def model(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(self.inputs, self.width), nn.ReLU()]
        for _ in range(self.hidden):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, self.outputs))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(self.examples, self.inputs, generator=generator)
        data = TensorExamples(inputs, torch.randint(self.outputs, (self.examples,), generator=generator))
        return data, TensorExamples(*(each[:2] for each in data.tensors))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": (model(batch[0]).argmax(dim=1) == batch[1]).double()}
