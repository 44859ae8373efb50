"""A tensor's values counted in the histogram's fixed bins, on its own device and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddp.watching.histogram import bin_of_code, bins, codes, shift


class ValueCounts:
    """Counts of many tensors, one row each, in the codes that a shift of a float32's bits gives."""

    def __init__(self, rows: int, bins_per_octave: int, device: torch.device) -> None:
        self._shift, self._codes = shift(bins_per_octave), codes(bins_per_octave)
        self._counts = torch.zeros(rows, self._codes, dtype=torch.int64, device=device)
        self._bins = bins(bins_per_octave)
        self._bin_of_code = torch.from_numpy(bin_of_code(bins_per_octave)).to(device)

    def add(self, row: int, values: Tensor) -> None:
        """`values`: of any shape and floating dtype; what float32 cannot hold counts as not finite."""
        bits = values.float().contiguous().view(torch.int32)
        code = (bits >> self._shift).bitwise_and_(self._codes - 1)
        self._counts[row] += torch.bincount(code.view(-1), minlength=self._codes)

    def binned(self) -> Tensor:
        """Shape (rows, bins + 1) float64, what is not finite last."""
        result = torch.zeros(len(self._counts), self._bins + 1, dtype=torch.float64, device=self._counts.device)
        return result.index_add_(1, self._bin_of_code, self._counts.double())
