"""Sums of squares of one gradient, plain and divided by Adam's denominator, in one pass and in float64.

    sum g^2     and     sum g^2 / (sqrt(v) c + eps)

Adam's second moments v stream beside the gradient g, element by element, so that nothing is kept of the
preconditioner between steps. On CPU a Numba loop; elsewhere torch's operations, whose sums stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddp.transport.jit import (
    add_product,
    add_square,
    carray,
    float32_pointer,
    float64_pointer,
    inlined,
    int16_pointer,
    on_demand,
    types,
    uint16_pointer,
    widen,
)


@dataclass(frozen=True, slots=True)
class Denominator:
    """Adam's: sqrt(second_moment) * root_correction + epsilon, elementwise.

    A complex parameter is two real ones to Adam: its second moment has theirs in its real and imaginary parts.
    """

    second_moment: Tensor  # of the parameter's shape and dtype
    root_correction: float  # 1 / sqrt(1 - beta_2^steps)
    epsilon: float

    def reciprocal(self) -> Tensor:
        """P, of the shape that `as_real` gives the parameter."""
        root = as_real(self.second_moment).sqrt()
        return root.mul_(self.root_correction).add_(self.epsilon).reciprocal_()


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor of shape (...) as real numbers of shape (..., 2); any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@inlined
def _divided_squares(gradient: Any, moment: Any, root_correction: Any, epsilon: Any, sums: Any) -> None:
    """The roots are taken in the moments' own precision, the rest in float64."""
    plain, divided = 0.0, 0.0
    for i in range(len(gradient)):
        element = types.float64(widen(gradient[i]))
        root = types.float64(math.sqrt(widen(moment[i])))
        plain = add_square(plain, element)
        divided = add_product(divided, element * element, 1.0 / (root * root_correction + epsilon))
    sums[0], sums[1] = plain, divided


@inlined
def _plain_squares(gradient: Any, sums: Any) -> None:
    plain = 0.0
    for i in range(len(gradient)):
        plain = add_square(plain, types.float64(widen(gradient[i])))
    sums[0], sums[1] = plain, 0.0


@inlined
def _squares(gradient: Any, moment: Any, root_correction: Any, epsilon: Any, sums_address: Any) -> None:
    sums = carray(float64_pointer(sums_address), 2)
    if len(moment) == len(gradient):
        _divided_squares(gradient, moment, root_correction, epsilon, sums)
    else:
        _plain_squares(gradient, sums)


# One function a dtype, written out: Numba would not find a closure in its cache again.
_SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64, types.float64, types.float64, types.int64)


@on_demand(_SIGNATURE)
def _float32(data: Any, length: Any, moment: Any, moments: Any, correction: Any, epsilon: Any, sums: Any) -> None:
    gradient, second = carray(float32_pointer(data), length), carray(float32_pointer(moment), moments)
    _squares(gradient, second, correction, epsilon, sums)


@on_demand(_SIGNATURE)
def _float64(data: Any, length: Any, moment: Any, moments: Any, correction: Any, epsilon: Any, sums: Any) -> None:
    gradient, second = carray(float64_pointer(data), length), carray(float64_pointer(moment), moments)
    _squares(gradient, second, correction, epsilon, sums)


@on_demand(_SIGNATURE)
def _bfloat16(data: Any, length: Any, moment: Any, moments: Any, correction: Any, epsilon: Any, sums: Any) -> None:
    gradient, second = carray(uint16_pointer(data), length), carray(uint16_pointer(moment), moments)
    _squares(gradient, second, correction, epsilon, sums)


@on_demand(_SIGNATURE)
def _float16(data: Any, length: Any, moment: Any, moments: Any, correction: Any, epsilon: Any, sums: Any) -> None:
    gradient, second = carray(int16_pointer(data), length), carray(int16_pointer(moment), moments)
    _squares(gradient, second, correction, epsilon, sums)


_KERNELS = {
    torch.float32: _float32,
    torch.float64: _float64,
    torch.bfloat16: _bfloat16,
    torch.float16: _float16,
}


def prepare(dtypes: Iterable[torch.dtype]) -> None:
    """Compile what gradients of these dtypes need on a CPU."""
    for dtype in dtypes:
        if dtype in _KERNELS:
            _KERNELS[dtype].prepare()


def gradient_squares_(sums: Tensor, gradient: Tensor, denominator: Denominator | None) -> None:
    """Write sum g^2 and, with a denominator, sum g^2 / (sqrt(v) c + eps) into `sums`; else 0 for the second.

    Args:
        sums: float64, shape (2,), contiguous, on the gradient's device.
        gradient: any floating-point or complex gradient, of any shape and strides.
        denominator: with a second moment of the gradient's shape.
    """
    moment = None if denominator is None else as_real(denominator.second_moment)
    gradient = as_real(gradient)
    if gradient.device.type != "cpu" or gradient.dtype not in _KERNELS or not _streams(gradient, moment):
        _by_torch(sums, gradient, moment, denominator)
        return
    moment_address, moments = (0, 0) if moment is None else (moment.data_ptr(), moment.numel())
    correction, epsilon = (1.0, 0.0) if denominator is None else (denominator.root_correction, denominator.epsilon)
    _KERNELS[gradient.dtype](
        gradient.data_ptr(), gradient.numel(), moment_address, moments, correction, epsilon, sums.data_ptr()
    )


def _streams(gradient: Tensor, moment: Tensor | None) -> bool:
    """Whether both lie in memory without gaps and in the same order."""
    if moment is None:
        return gradient.is_contiguous() or torch.empty_like(gradient).stride() == gradient.stride()
    same = moment.dtype == gradient.dtype and moment.device == gradient.device
    if gradient.is_contiguous() and moment.is_contiguous():
        return same
    dense = torch.empty_like(gradient).stride() == gradient.stride()
    return same and dense and moment.stride() == gradient.stride()


def _by_torch(sums: Tensor, gradient: Tensor, moment: Tensor | None, denominator: Denominator | None) -> None:
    """Norms in float32, or float64 for float64, whose partial sums torch makes in a tree; squared in float64."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    magnitude = gradient.to(wide)
    sums[0] = torch.linalg.vector_norm(magnitude).double().square()
    if denominator is None or moment is None:
        sums[1] = 0.0
        return
    root = moment.to(wide).sqrt()
    divisor = root.mul_(denominator.root_correction).add_(denominator.epsilon).sqrt_()
    sums[1] = torch.linalg.vector_norm(magnitude / divisor).double().square()
