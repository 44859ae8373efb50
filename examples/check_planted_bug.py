"""A task with a bug in it, for `check` to find: a hand-written backward that forgets a factor.

From the repository's root, as one process or on ranks; it ends with the exit code 1 and names the parameters:

    python -m ddp check --allow-import examples examples/check_planted_bug.toml
    torchrun --nproc-per-node 2 -m ddp check --allow-import examples examples/check_planted_bug.toml

With `--set task.options.bug=false` the backward is right, and so is everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddp.tasks.base import Goal, TensorExamples

CLASSES = 3


class _Swish(torch.autograd.Function):
    """x sigmoid(x). The derivative is s + x s (1 - s); the bug leaves x out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bug: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bug = bug
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * (s + (1.0 if ctx.bug else x) * s * (1 - s)), None


class Swish(nn.Module):
    """The activation with the hand-written backward."""

    def __init__(self, bug: bool) -> None:
        super().__init__()
        self.bug = bug

    def forward(self, x: Tensor) -> Tensor:
        result = _Swish.apply(x, self.bug)
        assert isinstance(result, Tensor)
        return result


class Blobs:
    """Which of three clouds does a point come from? Batches are (points (n, 4), labels (n,) int64)."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def __init__(self, bug: bool = True, examples: int = 600, width: int = 32, label_smoothing: float = 0.0) -> None:
        self.bug, self.examples, self.width, self.label_smoothing = bug, examples, width, label_smoothing

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, self.width),
            nn.Tanh(),
            nn.Linear(self.width, self.width),
            Swish(self.bug),
            nn.Linear(self.width, CLASSES),
        )

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        return self._points(self.examples, seed=0), self._points(self.examples // 4, seed=1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, labels = batch
        return cross_entropy(model(points), labels, reduction="none", label_smoothing=self.label_smoothing)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        points, labels = batch
        return {"accuracy": model(points).argmax(dim=1) == labels}

    def _points(self, examples: int, seed: int) -> TensorExamples:
        """The same points on every rank, standardised."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (examples,), generator=generator)
        centres = torch.tensor([[1.0, 0, 1, 0], [-1, 1, 0, 0], [0, -1, -1, 0]])
        points = centres[labels] + 0.7 * torch.randn(examples, 4, generator=generator)
        return TensorExamples(points, labels)
