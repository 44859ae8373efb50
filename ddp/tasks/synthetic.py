"""A quadratic whose training curve is known exactly: for tests of whatever claims to measure noise scales.

L(theta) = sum_i h_i theta_i^2 / 2, and an example's loss is L(theta) + sigma xi theta with xi ~ N(0, I) drawn anew each
time. Its gradient is h theta + sigma xi: |G|^2 = sum h_i^2 theta_i^2, tr(Sigma) = sigma^2 D. With plain SGD at the
learning rate e and batches of b, exactly, E theta_i^2 becomes (1 - e h_i)^2 E theta_i^2 + e^2 sigma^2 / b in each step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddp.job import QuadraticSection
from ddp.tasks.base import Goal, TensorExamples

EXAMPLES = 1 << 18  # so many that drawing them without replacement is no different; they hold nothing
VALIDATION_EXAMPLES = 64


class QuadraticTask:
    """Find the bottom of a bowl by noisy gradients. Batches are ((n,) uint8,), of which only the length counts."""

    goals: Mapping[str, Goal] = {"distance": "min"}

    def __init__(self, section: QuadraticSection) -> None:
        self.section = section

    def model(self) -> nn.Module:
        section = self.section
        return Bowl(curvatures(section), section.noise, section.distance)

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        return tuple(TensorExamples(torch.zeros(count, dtype=torch.uint8)) for count in (EXAMPLES, VALIDATION_EXAMPLES))  # type: ignore[return-value]

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0])

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> Mapping[str, Tensor]:
        (position,) = model.parameters()
        return {"distance": position.norm().expand(len(batch[0]))}


def curvatures(section: QuadraticSection) -> Tensor:
    """h, (dimension,) float32: from 1 down to 1/condition_number by equal factors."""
    shares = torch.linspace(0.0, 1.0, section.dimension, dtype=torch.float64)
    return torch.pow(section.condition_number, -shares).float()


def start(dimension: int, distance: float) -> Tensor:
    """(dimension,) float32 of the norm `distance`, in one direction for good: whatever the seed of a run."""
    direction = torch.randn(dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (distance * direction / direction.norm()).float()


class Bowl(nn.Module):
    """The quadratic at its present position, which starts unequally far from the bottom along its axes.

    Adam goes at one pace along all of them: from equal distances it would swing through the bottom after a few steps, and
    be there long before it settles.

    Takes (n,) of anything and returns the losses of n examples, (n,): with noise in training mode, without in
    evaluation mode, since its mean is 0.
    """

    curvatures: Tensor

    def __init__(self, curvatures: Tensor, noise: float, distance: float) -> None:
        super().__init__()
        self.register_buffer("curvatures", curvatures, persistent=False)
        self.position = nn.Parameter(start(len(curvatures), distance))
        self.noise = noise

    def forward(self, examples: Tensor) -> Tensor:
        loss = 0.5 * (self.curvatures * self.position.square()).sum()
        if not self.training:
            return loss.expand(len(examples))
        draws = torch.randn(len(examples), len(self.position), device=self.position.device)
        return loss + self.noise * (draws @ self.position)
