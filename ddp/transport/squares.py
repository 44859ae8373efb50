"""Sums of squares of a CPU bucket, parameter by parameter, in one pass and in float64.

For transports that hand the bucket to somebody else's loops; our own loops take the sums on their way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp.transport.jit import (
    add_square,
    carray,
    float32_pointer,
    float64_pointer,
    inlined,
    int16_pointer,
    int64_pointer,
    on_demand,
    types,
    uint16_pointer,
    widen,
)


@inlined
def _sum_squares(values: Any) -> Any:
    total = 0.0
    for i in range(len(values)):
        total = add_square(total, types.float64(widen(values[i])))
    return total


@inlined
def _by_segment(bucket: Any, ends_address: Any, segments: Any, sums_address: Any) -> None:
    """Each segment is a slice of its own, because a loop from index 0 is what vectorises."""
    ends, sums = carray(int64_pointer(ends_address), segments), carray(float64_pointer(sums_address), segments)
    start = 0
    for segment in range(segments):
        sums[segment] = _sum_squares(bucket[start : ends[segment]])
        start = ends[segment]


# One function a dtype, written out: Numba would not find a closure in its cache again.
_SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64, types.int64)


@on_demand(_SIGNATURE)
def _squares_float32(data_address: Any, length: Any, ends_address: Any, segments: Any, sums_address: Any) -> None:
    _by_segment(carray(float32_pointer(data_address), length), ends_address, segments, sums_address)


@on_demand(_SIGNATURE)
def _squares_float64(data_address: Any, length: Any, ends_address: Any, segments: Any, sums_address: Any) -> None:
    _by_segment(carray(float64_pointer(data_address), length), ends_address, segments, sums_address)


@on_demand(_SIGNATURE)
def _squares_bfloat16(data_address: Any, length: Any, ends_address: Any, segments: Any, sums_address: Any) -> None:
    _by_segment(carray(uint16_pointer(data_address), length), ends_address, segments, sums_address)


@on_demand(_SIGNATURE)
def _squares_float16(data_address: Any, length: Any, ends_address: Any, segments: Any, sums_address: Any) -> None:
    _by_segment(carray(int16_pointer(data_address), length), ends_address, segments, sums_address)


_KERNELS = {
    torch.float32: _squares_float32,
    torch.float64: _squares_float64,
    torch.bfloat16: _squares_bfloat16,
    torch.float16: _squares_float16,
}


def prepare(dtypes: Iterable[torch.dtype]) -> None:
    """Compile what buckets of these dtypes need."""
    for dtype in dtypes:
        _KERNELS[dtype].prepare()


def squared_norms_(sums: NDArray[np.float64], bucket: Tensor, ends: NDArray[np.int64]) -> float:
    """Write each segment's sum of squares into `sums`, and return the whole bucket's.

    Args:
        bucket: 1-D contiguous CPU tensor of float32, float64, bfloat16 or float16.
        ends: where each segment ends in it, rising.
    """
    if ends.size:
        _KERNELS[bucket.dtype](bucket.data_ptr(), len(bucket), ends.ctypes.data, ends.size, sums.ctypes.data)
    return float(sums.sum())
