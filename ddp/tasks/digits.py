"""scikit-learn's bundled handwritten digits: 1,797 images of 8x8 pixels, and a small convolutional network.

Real data that needs no download: a run of seconds that reaches 97 % validation accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddp.errors import UsageError
from ddp.job import DigitsSection
from ddp.tasks.base import Goal, TensorExamples

TRAINING_EXAMPLES = 1472  # 23 batches of 64
SPLIT_SEED = 0  # not the run's: every run is validated on the same images


class DigitsTask:
    """Which of ten digits is it? Batches are (images (n, 1, 8, 8) float32, labels (n,) int64)."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}
    class_dimension = 1

    def __init__(self, section: DigitsSection) -> None:
        self.section = section

    def model(self) -> nn.Module:
        return build_network(self.section.channels, self.section.batch_norm, self.section.dropout)

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        images, labels = _load()
        order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
        training, validation = order[:TRAINING_EXAMPLES], order[TRAINING_EXAMPLES:]
        mean, deviation = images[training].mean(), images[training].std()
        images = (images - mean) / deviation
        return (
            TensorExamples(images[training], labels[training]),
            TensorExamples(images[validation], labels[validation]),
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(model(images), labels, reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        images, labels = batch
        return {"accuracy": model(images).argmax(dim=1) == labels}


def build_network(channels: int, batch_norm: bool, dropout: float) -> nn.Sequential:
    """Two 3x3 convolutions, each halving the resolution, then a linear layer: (n, 1, 8, 8) to (n, 10)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, channels), (channels, 2 * channels)):
        layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * channels * 2 * 2, 10)]
    return nn.Sequential(*layers)


def _load() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) float32 with values from 0 to 16, labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "task digits: scikit-learn, which brings the images, is not installed; "
            "install the `examples` extra: pip install -e '.[examples]'"
        ) from None
    bundled: Any = load_digits()
    images = torch.from_numpy(bundled.images.astype(np.float32)).unsqueeze(1)
    return images, torch.from_numpy(bundled.target.astype(np.int64))
