"""Write scikit-learn's handwritten digits as the four IDX files that MNIST has, for examples/images.toml.

    python examples/digits_as_idx.py data/digits

The images of 8x8 pixels become 20x20 in the middle of 28x28, as MNIST's are; 1,472 for training, 325 for validation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, from_numpy
from torch.nn.functional import interpolate, pad

from ddp.tasks.idx import write_idx

TRAINING_IMAGES = 1472
INNER, MARGIN = 20, 4  # pixels


def main(folder: Path) -> None:
    bundled = load_digits()
    order = np.random.default_rng(0).permutation(len(bundled.images))  # type: ignore[union-attr]
    images = upsampled(from_numpy(bundled.images[order]))  # type: ignore[union-attr]
    labels = bundled.target[order].astype(np.uint8)  # type: ignore[union-attr]
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(None, TRAINING_IMAGES)), ("t10k", slice(TRAINING_IMAGES, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels[rows])


def upsampled(images: Tensor) -> NDArray[np.uint8]:
    """(n, 8, 8) with values from 0 to 16 to (n, 28, 28) from 0 to 255."""
    larger = interpolate(images.float().unsqueeze(1) / 16, size=INNER, mode="bilinear")
    return (255 * pad(larger, (MARGIN,) * 4)).round().byte().squeeze(1).numpy()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/digits_as_idx.py FOLDER")
    main(Path(sys.argv[1]))
