"""Pictures in a folder for each class, decoded when they are wanted.

Pillow decodes them, which matplotlib brings. Only formats of pixels are admitted, and sizes are looked at before a
picture is unpacked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddp.errors import LoaderError, UsageError
from ddp.job import opened_plain_file

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP", ".pgm": "PPM", ".ppm": "PPM"}
MOST_PIXELS = 1 << 27  # of one picture
TRAINING, VALIDATION = "train", ("validation", "val", "test")


@dataclass(frozen=True, slots=True)
class PictureFiles:
    """Paths and classes, as numbers, of a set of pictures."""

    paths: Sequence[Path]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Folder:
    """What was found; `validation` is None where it is to be split off."""

    classes: Sequence[str]
    training: PictureFiles
    validation: PictureFiles | None


def find_pictures(folder: Path) -> Folder | None:
    """train/CLASS/PICTURE and validation/CLASS/PICTURE, or CLASS/PICTURE; None where there are no folders.

    Classes are numbered in the order of their names.

    Raises:
        UsageError: a class has no pictures, or the validation set has one that the training set has not.
    """
    training = folder / TRAINING if (folder / TRAINING).is_dir() else folder
    classes = _folders(training)
    if not classes:
        return None
    found = _files(training, classes)
    seen = set(found.labels)
    for number, name in enumerate(classes):
        if number not in seen:
            raise UsageError(f"task.path: {training / name} has no picture in it; known are {', '.join(FORMATS)}")
    if training == folder:
        return Folder(classes, found, None)
    for name in VALIDATION:
        if (folder / name).is_dir():
            if foreign := sorted(set(_folders(folder / name)) - set(classes)):
                raise UsageError(f"task.path: {folder / name / foreign[0]}: {training} has no class of that name")
            validation = _files(folder / name, classes)
            if not validation.paths:
                raise UsageError(
                    f"task.path: {folder / name} has no picture in its classes' folders; without that folder a part of the "
                    "training set is kept for validation"
                )
            return Folder(classes, found, validation)
    return Folder(classes, found, None)


def _folders(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _files(folder: Path, classes: Sequence[str]) -> PictureFiles:
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in FORMATS)
        paths += [path for path in found if not path.name.startswith(".")]
        labels += [number] * (len(paths) - len(labels))
    return PictureFiles(paths, labels)


def require_pillow() -> None:
    """Raises UsageError where there is none, before anything is decoded."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError(
            "task images: Pillow, which decodes pictures, is not installed; install the `report` extra, which brings it: "
            "pip install -e '.[report]'"
        ) from None


def read_picture(path: Path, size: int, *, colour: bool) -> Tensor:
    """(3 or 1, size, size) uint8: scaled so that it fills the square, and cut to its middle.

    Raises:
        LoaderError: it cannot be read or decoded, or is far too large.
    """
    from PIL import Image, ImageOps

    try:
        with (
            warnings.catch_warnings(),
            opened_plain_file(path) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            warnings.simplefilter("ignore")  # of its own limit of size, and of metadata that is not used
            with Image.open(file, formats=sorted(set(FORMATS.values()))) as image:
                _check(image)
                image.draft("RGB" if colour else "L", (size, size))  # JPEG: decode no more than is needed
                upright: Any = ImageOps.exif_transpose(image)
                filled = ImageOps.fit(
                    upright.convert("RGB" if colour else "L"), (size, size), Image.Resampling.BILINEAR
                )
    except Exception as error:  # decoders of damaged files raise nearly anything
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise LoaderError(f"data: {path}: cannot read the picture: {text}; mend it or take it away") from error
    pixels = torch.from_numpy(np.array(filled, dtype=np.uint8)).view(size, size, -1)
    return pixels.permute(2, 0, 1).contiguous()


def _check(image: Any) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")
    if image.mode.startswith(("I", "F")):
        raise ValueError("it has more than eight bits a channel: convert it")
