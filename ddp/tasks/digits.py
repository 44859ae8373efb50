"""scikit-learn's bundled handwritten digits: 1,797 images of 8x8 pixels, and a small convolutional network.

Real data that needs no download: a run of seconds that reaches 97 % validation accuracy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddp.errors import UsageError
from ddp.job import DigitsSection
from ddp.tasks.base import TensorExamples
from ddp.tasks.classification import Classification
from ddp.tasks.networks import convolutional_network

IMAGE, CLASSES = (1, 8, 8), 10
TRAINING_EXAMPLES = 1472  # 23 batches of 64
SPLIT_SEED = 0  # not the run's: every run is validated on the same images


class DigitsTask(Classification):
    """Which of ten digits is it? Batches are (images (n, 1, 8, 8) float32, labels (n,) int64)."""

    def __init__(self, section: DigitsSection) -> None:
        super().__init__(section.label_smoothing)
        self.section = section

    def model(self) -> nn.Module:
        return convolutional_network(self.section, IMAGE, CLASSES)

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
