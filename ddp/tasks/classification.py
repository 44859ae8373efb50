"""What the tasks share that tell classes apart: loss with label smoothing, accuracy, and both from one forward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddp.tasks.base import Goal

Batch = tuple[Tensor, Tensor]


class Classification:
    """Batches are (images (n, channels, height, width) float32, labels (n,) int64); the model gives logits (n, classes)."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}
    class_dimension = 1

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss_and_metrics(model, batch)[0]

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return self.loss_and_metrics(model, batch)[1]

    def loss_and_metrics(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Both of each example, (n,), from one forward; the loss is smoothed while the model is in training mode."""
        images, labels = batch
        logits = model(images)
        smoothing = self._label_smoothing if model.training else 0.0
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return losses, {"accuracy": logits.detach().argmax(dim=1) == labels}
