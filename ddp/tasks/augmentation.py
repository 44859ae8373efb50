"""Random changes to images that leave what they show the same, made anew each time a model trains on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample


class RandomAffine(nn.Module):
    """Turn and shift each image of (n, channels, height, width) on its own; in evaluation mode they stay as they are.

    A layer of the model, so that it is off wherever dropout is, and draws from the rank's generator, which checkpoints
    hold: a resumed run sees what it would have seen, with any number of data workers. What comes in at the edges repeats
    the edge.

    Args:
        rotation_degrees: at most, uniform both ways.
        shift: at most, as a fraction of the height and of the width, uniform both ways.
    """

    draws_anew = True  # as dropout does: a batch is no draw from a finite set of examples

    def __init__(self, rotation_degrees: float, shift: float) -> None:
        super().__init__()
        self.rotation_degrees, self.shift = rotation_degrees, shift

    def forward(self, images: Tensor) -> Tensor:
        return self.changed(images) if self.training else images

    def changed(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        draws = 2 * torch.rand(3, count, device=images.device) - 1
        angle = math.radians(self.rotation_degrees) * draws[0]
        across, down = 2 * self.shift * draws[1], 2 * self.shift * draws[2]  # the grid goes from -1 to 1
        sine, cosine = angle.sin(), angle.cos()
        # Coordinates are fractions of the width and of the height: turning is by angles of pixels.
        rows = [cosine, -sine * height / width, across, sine * width / height, cosine, down]
        matrices = torch.stack(rows, dim=1).view(count, 2, 3)
        grid = affine_grid(matrices, list(images.shape), align_corners=False).to(images.dtype)
        return grid_sample(images, grid, padding_mode="border", align_corners=False)
