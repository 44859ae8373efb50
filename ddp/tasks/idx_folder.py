"""A folder of IDX files: which of them are the images and labels, by the names that MNIST and EMNIST give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddp.errors import UsageError
from ddp.tasks.idx import read_idx

NAME = re.compile(
    r"(?:(?P<prefix>.+)-)?(?P<part>train|t10k|test|validation)-(?P<kind>images|labels)[-.]idx(?P<dimensions>[13])-ubyte(?:\.gz)?"
)
Kind = Literal["images", "labels"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images (n, height, width) and their labels (n,), both uint8 as they are in the files."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class IdxFiles:
    """The files of one set: `validation` is None where there is none."""

    prefix: str
    training: Mapping[str, Path]
    validation: Mapping[str, Path] | None


def find_idx_files(folder: Path, prefix: str | None) -> IdxFiles | None:
    """The set of this prefix, or the only one there is; None where no file is named like one of IDX.

    Raises:
        UsageError: the folder holds several sets, not the one that is asked for, or a part of one.
    """
    sets: dict[str, dict[str, dict[str, Path]]] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # of x and x.gz the plain one stays
        if (found := NAME.fullmatch(path.name)) is not None:
            part = "training" if found["part"] == "train" else "validation"
            sets.setdefault(found["prefix"] or "", {}).setdefault(part, {})[found["kind"]] = path
    if not sets:
        return None
    names = ", ".join(sorted(repr(name) for name in sets))
    if prefix is None and len(sets) > 1:
        raise UsageError(f"task.prefix: {folder} holds several sets of IDX files; choose one of {names}")
    chosen = next(iter(sets)) if prefix is None else prefix
    if chosen not in sets:
        raise UsageError(f"task.prefix: {folder} holds no IDX files that begin with {chosen!r}; there are {names}")
    parts = sets[chosen]
    for part in ("training", *(["validation"] if "validation" in parts else [])):
        for kind in ("images", "labels"):
            if kind not in parts.get(part, {}):
                raise UsageError(
                    f"task.path: {folder} has no {part} {kind}: a file named like "
                    f"{chosen + '-' * bool(chosen)}{'train' if part == 'training' else 't10k'}-{kind}-idx{3 if kind == 'images' else 1}-ubyte "
                    "or the same with .gz"
                )
    return IdxFiles(chosen, parts["training"], parts.get("validation"))


def read_labelled(files: Mapping[str, Path], *, transposed: bool) -> Labelled:
    """The images and labels of one part.

    Raises:
        UsageError: a file is not what it should be, or there are not as many labels as images.
    """
    images, labels = read_idx(files["images"], dimensions=3), read_idx(files["labels"], dimensions=1)
    if len(images) != len(labels):
        raise UsageError(
            f"task.path: {files['images']} has {len(images):,} images, {files['labels'].name} {len(labels):,} labels"
        )
    return Labelled(np.ascontiguousarray(images.transpose(0, 2, 1)) if transposed else images, labels)
