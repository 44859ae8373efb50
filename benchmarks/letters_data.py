"""The images that letters.py reads where none are given: real handwriting, made harder, as the IDX files of MNIST.

scikit-learn's digits, 8x8, become 20x20 in the middle of 28x28; each is there several times, turned and shifted at random.
No writer's image is in both the training and the validation set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate, pad

from ddp.tasks.augmentation import RandomAffine
from ddp.tasks.idx import write_idx

TRAINING_IMAGES = 1472  # of 1,797
COPIES = {"train": 20, "t10k": 4}
INNER, MARGIN = 20, 4  # pixels
ROTATION_DEGREES, SHIFT = 60.0, 0.2


def write_letters(folder: Path) -> None:
    """29,440 training and 1,300 validation images; the same whenever they are made."""
    bundled = load_digits()
    order = np.random.default_rng(0).permutation(len(bundled.images))  # type: ignore[union-attr]
    images = torch.from_numpy(bundled.images[order]).float().unsqueeze(1) / 16  # type: ignore[union-attr]
    images = pad(interpolate(images, size=INNER, mode="bilinear"), (MARGIN,) * 4)
    labels = bundled.target[order].astype(np.uint8)  # type: ignore[union-attr]
    change = RandomAffine(ROTATION_DEGREES, SHIFT)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, rows in (("train", slice(None, TRAINING_IMAGES)), ("t10k", slice(TRAINING_IMAGES, None))):
            made = torch.cat([change.changed(images[rows]) for _ in range(COPIES[part])])
            write_idx(folder / f"{part}-images-idx3-ubyte", (255 * made).round().byte().squeeze(1).numpy())
            write_idx(folder / f"{part}-labels-idx1-ubyte", np.tile(labels[rows], COPIES[part]))
