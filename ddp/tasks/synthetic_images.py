"""Images that are made, not read, and a residual network: throughput at the size of real photographs.

Each class has a coarse pattern of its own, an image is that pattern in noise. Both are cut from memory, so that data cost
next to nothing, and an image is the same whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from ddp.job import SyntheticImagesSection
from ddp.tasks.classification import Classification
from ddp.tasks.resnet import residual_network

CHANNELS, COARSE = 3, 4  # a pattern has COARSE x COARSE squares
WINDOWS = 4096  # different pieces of noise
STRIDE = 61  # values between where two of them begin


class SyntheticImagesTask(Classification):
    """Whose pattern is it? Batches are (images (n, 3, size, size) float32, labels (n,) int64)."""

    def __init__(self, section: SyntheticImagesSection) -> None:
        super().__init__(section.label_smoothing)
        self.section = section

    def model(self) -> nn.Module:
        section = self.section
        return residual_network(section.depth, section.classes, width=section.width, dropout=section.dropout)

    def datasets(self) -> tuple[SyntheticImages, SyntheticImages]:
        section = self.section
        training = SyntheticImages(section, 0, section.examples)
        return training, SyntheticImages(section, section.examples, section.validation_examples)


class SyntheticImages(Dataset[tuple[Tensor, Tensor]]):
    """`count` of the images, from number `first` on; every rank makes the same ones."""

    def __init__(self, section: SyntheticImagesSection, first: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)  # not the run's
        self._first, self._count, self._size, self._classes = first, count, section.size, section.classes
        shape = (min(section.classes, WINDOWS), CHANNELS, COARSE, COARSE)
        patterns = torch.randint(0, 2, shape, generator=generator).float()
        self._patterns = 2 * patterns - 1  # classes differ by 2 in half of the squares
        values = CHANNELS * section.size**2 + STRIDE * (WINDOWS - 1)
        self._noise = section.noise * torch.randn(values, generator=generator)

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> Tensor:
        """Of all examples, (count,) int64, without making an image."""
        return _scattered(self._first + torch.arange(self._count), self._classes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        numbers = self._first + torch.as_tensor(indices)
        labels = _scattered(numbers, self._classes)
        values, shape = CHANNELS * self._size**2, (CHANNELS, self._size, self._size)
        starts = (STRIDE * _scattered(numbers + self._classes, WINDOWS)).tolist()
        noise = torch.stack([self._noise[start : start + values].view(shape) for start in starts])
        patterns = self._patterns[labels % len(self._patterns)]
        return noise.add_(interpolate(patterns, size=self._size)), labels

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch


def _scattered(numbers: Tensor, count: int) -> Tensor:
    """Each number's place among `count`, without an order to be seen (Knuth's multiplicative hash)."""
    return ((numbers * 2654435761) % (1 << 32) >> 8) % count
