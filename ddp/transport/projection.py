"""A few numbers of a rank's own gradient that tell shards apart which are not drawn alike.

The dot products of the gradient of the smallest parameters, biases above all, with directions of +1 and -1. Biases of
an output layer tell classes apart, and few elements cost a few microseconds. The directions are the same on all ranks and in
all steps; one alone may lie across the difference between two ranks (`ddp.noise.shards` has what is made of them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ddp.transport.row import DIRECTIONS

ELEMENTS = 4096  # at most, over the whole model
_SEED = 20_181_214


class SmallParameters:
    """The elements of a model whose gradient is projected: the first `ELEMENTS`, smallest parameters first."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._signs: dict[Tensor, Tensor] = {}
        generator, left = torch.Generator().manual_seed(_SEED), ELEMENTS
        for parameter in sorted(parameters, key=Tensor.numel):  # stable: ties in the model's order, as on all ranks
            taken = min(parameter.numel(), left)
            if not taken:
                continue
            self._signs[parameter] = 2.0 * torch.randint(2, (DIRECTIONS, taken), generator=generator) - 1.0
            left -= taken

    def in_bucket(self, parameters: Sequence[Tensor], ends: Iterable[int], device: torch.device) -> BucketProjection:
        """Of the bucket that holds `parameters`, each ending at its place in `ends`."""
        places, signs, start = [], [], 0
        for parameter, end in zip(parameters, ends, strict=True):
            if parameter in self._signs:
                signs.append(self._signs[parameter])
                places.append(torch.arange(start, start + signs[-1].shape[1]))
            start = int(end)
        if not places:
            return BucketProjection(None, torch.empty(DIRECTIONS, 0))
        return BucketProjection(torch.cat(places).to(device), torch.cat(signs, dim=1).to(device))


class BucketProjection:
    """Where in a bucket those elements lie, and their signs in each direction."""

    def __init__(self, places: Tensor | None, signs: Tensor) -> None:
        self._places = places  # (n,) int64
        self._signs = signs  # (DIRECTIONS, n) float32

    def of(self, bucket: Tensor) -> Tensor | None:
        """Shape (DIRECTIONS,), float32, where the bucket is; None where it holds no such element."""
        if self._places is None:
            return None
        return torch.mv(self._signs, bucket.index_select(0, self._places).float())
