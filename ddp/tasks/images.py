"""Images from a folder of the user's, IDX files or pictures by class, and a small convolutional network.

The set is read as it is, told apart by what the folder holds. Images are standardised by the training set's mean and
standard deviation of each channel. IDX files are held in memory as bytes, by every rank; pictures are decoded when a batch
wants them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp.errors import LoaderError, UsageError
from ddp.job import ImagesSection
from ddp.tasks.augmentation import RandomAffine
from ddp.tasks.classification import Classification
from ddp.tasks.idx_folder import IdxFiles, find_idx_files, read_labelled
from ddp.tasks.networks import convolutional_network
from ddp.tasks.pictures import FORMATS, Folder, find_pictures, read_picture, require_pillow

SPLIT_SEED = 0  # not the run's: every run is validated on the same images
STATISTICS_PICTURES = 512  # that mean and deviation are taken from, where decoding all of them would take long
STATISTICS_VALUES = 1 << 22  # at once, 32 MiB in float64


class Source(Protocol):
    """Where pixels come from."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Tensor:
        """(n, channels, height, width) uint8."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """`images` (n, channels, height, width) uint8 in memory."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(indices)]


@dataclass(frozen=True, slots=True)
class Pictures:
    """Files, each scaled and cut to size x size when it is taken."""

    paths: Sequence[Path]
    size: int
    colour: bool

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([read_picture(self.paths[index], self.size, colour=self.colour) for index in indices])


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of each channel, (channels, 1, 1) float32."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.deviation


class ImageExamples(Dataset[tuple[Tensor, Tensor]]):
    """The images of `source` at `rows`, standardised, with their `labels` (n,) int64, one for each of these rows."""

    def __init__(self, source: Source, labels: Tensor, rows: NDArray[np.int64], scale: Scale) -> None:
        self.source, self.labels, self.rows, self.scale = source, labels, rows, scale

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = self.rows[np.asarray(indices)]
        return self.scale(self.source.take(rows.tolist())), self.labels[torch.as_tensor(indices)]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch


@dataclass(frozen=True, slots=True)
class ImageSet:
    """What the folder holds: `validation` rows of the same or of a second source; labels from 0 on."""

    classes: Sequence[str]
    training: ImageExamples
    validation: ImageExamples


class ImagesTask(Classification):
    """Which class is it? Batches are (images (n, channels, height, width) float32, labels (n,) int64)."""

    def __init__(self, section: ImagesSection) -> None:
        super().__init__(section.label_smoothing)
        self.section = section

    @cached_property
    def images(self) -> ImageSet:
        """Read when first wanted.

        Raises:
            UsageError: the folder or what is in it cannot be used.
        """
        return read_folder(self.section)

    def model(self) -> nn.Module:
        section = self.section
        augmentation = RandomAffine(section.rotation_degrees, section.shift) if section.augment else None
        image, _ = self.images.training[0]
        channels, height, width = image.shape
        return convolutional_network(section, (channels, height, width), len(self.images.classes), augmentation)

    def datasets(self) -> tuple[ImageExamples, ImageExamples]:
        return self.images.training, self.images.validation


def read_folder(section: ImagesSection) -> ImageSet:
    """Training and validation sets of `section.path`, whichever of both layouts it has."""
    folder = Path(section.path)
    try:
        if (files := find_idx_files(folder, section.prefix)) is not None:
            return _read_idx_files(files, section)
        if section.prefix is not None:
            raise UsageError(f"task.prefix: {folder} holds no IDX files")
        if (pictures := find_pictures(folder)) is not None:
            return _with_pictures(pictures, section)
    except OSError as error:
        raise UsageError(f"task.path: cannot read {error.filename or folder}: {error.strerror}") from None
    raise UsageError(
        f"task.path: {folder} holds neither IDX files (train-images-idx3-ubyte and so on, or the same with .gz) nor pictures "
        f"({', '.join(FORMATS)}) in train/CLASS/ or CLASS/"
    )


def _read_idx_files(files: IdxFiles, section: ImagesSection) -> ImageSet:
    transposed = files.prefix.startswith("emnist") if section.transposed == "auto" else section.transposed
    training = read_labelled(files.training, transposed=transposed)
    names = np.unique(training.labels)  # from 1 on in EMNIST's letters
    sources, labels = [_stored(training.images)], [_numbered(training.labels, names, files.training)]
    if files.validation is not None:
        validation = read_labelled(files.validation, transposed=transposed)
        if validation.images.shape[1:] != training.images.shape[1:]:
            raise UsageError(
                f"task.path: {files.validation['images']} has images of another height or width than "
                f"{files.training['images'].name}"
            )
        sources.append(_stored(validation.images))
        labels.append(_numbered(validation.labels, names, files.validation))
    return _image_set([str(name) for name in names], sources, labels, section)


def _stored(images: NDArray[np.uint8]) -> Stored:
    return Stored(torch.from_numpy(images).unsqueeze(1))


def _numbered(labels: NDArray[np.uint8], names: NDArray[np.uint8], files: Mapping[str, Path]) -> Tensor:
    """From 0 on, without gaps, (n,) int64."""
    if (foreign := np.setdiff1d(labels, names)).size:
        raise UsageError(f"task.path: {files['labels']} has the label {foreign[0]}, which no training image has")
    return torch.from_numpy(np.searchsorted(names, labels).astype(np.int64))


def _with_pictures(folder: Folder, section: ImagesSection) -> ImageSet:
    require_pillow()
    sets = [folder.training, *([folder.validation] if folder.validation is not None else [])]
    sources = [Pictures(each.paths, section.size, section.colour) for each in sets]
    return _image_set(folder.classes, sources, [torch.tensor(each.labels) for each in sets], section)


def _image_set(
    classes: Sequence[str], sources: Sequence[Source], labels: Sequence[Tensor], section: ImagesSection
) -> ImageSet:
    """Of one source, a part is kept for validation; of two, the second is."""
    if len(classes) < 2:
        raise UsageError(f"task.path: {section.path} has one class only: there is nothing to tell apart")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(sources[0]))
    kept = 0 if len(sources) > 1 else max(1, round(section.validation_fraction * len(order)))
    if kept >= len(order):
        raise UsageError(f"task.validation_fraction: it leaves none of the {len(order)} images for training")
    rows = np.sort(order[kept:])
    scale = _scale(sources[0], rows)
    validation_rows = np.arange(len(sources[-1])) if len(sources) > 1 else np.sort(order[:kept])
    return ImageSet(
        classes,
        ImageExamples(sources[0], labels[0][torch.from_numpy(rows)], rows, scale),
        ImageExamples(sources[-1], labels[-1][torch.from_numpy(validation_rows)], validation_rows, scale),
    )


def _scale(source: Source, rows: NDArray[np.int64]) -> Scale:
    """Of the images at `rows`; of pictures, of some of them."""
    if isinstance(source, Pictures):
        rows = rows[np.linspace(0, len(rows) - 1, min(STATISTICS_PICTURES, len(rows))).astype(int)]
    moments: list[Tensor] = []
    try:
        first = source.take([int(rows[0])])[0]
        at_once = max(STATISTICS_VALUES // first.numel(), 1)
        for start in range(0, len(rows), at_once):
            pixels = source.take(rows[start : start + at_once].tolist()).double()
            moments.append(torch.stack([pixels.sum(dim=(0, 2, 3)), pixels.square().sum(dim=(0, 2, 3))]))
    except LoaderError as error:
        raise UsageError(str(error)) from None
    count = len(rows) * first[0].numel()
    mean, square = torch.stack(moments).sum(dim=0) / count
    variance = square - mean.square()
    if float(variance.max()) <= 0:
        raise UsageError("task.path: all training images are of one and the same grey: there is nothing to tell apart")
    deviation = variance.clamp(min=0).sqrt()
    deviation[deviation == 0] = 1.0  # a channel that is the same throughout
    return Scale(mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1))
