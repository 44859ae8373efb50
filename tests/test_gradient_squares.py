"""Sums of squares of one gradient, plain and divided by Adam's denominator, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddp.metering.preconditioner import preconditioner_of
from ddp.search.gradient_noise import adam_preconditioner, squared_norm
from ddp.transport.gradient_squares import Denominator, as_real, gradient_squares_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def expected(gradient: Tensor, denominator: Denominator | None) -> list[float]:
    squares = gradient.to(torch.complex128).abs().square()
    if denominator is None:
        return [squares.sum().item(), 0.0]
    root = denominator.second_moment.double().sqrt() * denominator.root_correction
    return [squares.sum().item(), (squares / (root + denominator.epsilon)).sum().item()]


def measured(gradient: Tensor, denominator: Denominator | None) -> list[float]:
    sums = torch.full((2,), -1.0, dtype=torch.float64)
    gradient_squares_(sums, gradient, denominator)
    return sums.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 13), (3, 5, 2, 2), (10_007,)], ids=str)
def test_both_sums_are_those_of_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    moment = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    for denominator in (None, Denominator(moment, 1.7, 1e-3)):
        assert measured(gradient, denominator) == pytest.approx(expected(gradient, denominator), rel=1e-7)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("of_gradient", [lambda each: each, channels_last, lambda each: each.mT.contiguous().mT])
@pytest.mark.parametrize("of_moment", [lambda each: each, channels_last])
def test_elements_meet_whatever_their_order_in_memory(
    of_gradient: Callable[[Tensor], Tensor], of_moment: Callable[[Tensor], Tensor]
) -> None:
    gradient, moment = torch.randn(3, 4, 5, 6), torch.rand(3, 4, 5, 6)
    denominator = Denominator(of_moment(moment), 1.0, 1e-8)
    wanted = expected(gradient, Denominator(moment, 1.0, 1e-8))
    assert measured(of_gradient(gradient), denominator) == pytest.approx(wanted, rel=1e-6)
    assert measured(of_gradient(gradient), None) == pytest.approx([wanted[0], 0.0], rel=1e-6)


def test_views_with_gaps_broadcast_and_complex_gradients() -> None:
    for gradient in (torch.randn(6, 8)[:, ::2], torch.randn(5, 1).expand(5, 3), torch.randn(4, dtype=torch.complex64)):
        moment = torch.rand(gradient.shape)
        denominator = None if gradient.is_complex() else Denominator(moment, 1.0, 1e-8)
        assert measured(gradient, denominator) == pytest.approx(expected(gradient, denominator), rel=1e-6)


def test_extremes_neither_overflow_nor_underflow() -> None:
    gradient, moment = torch.tensor([1e-25, 3e25, 0.0]), torch.tensor([0.0, 1e30, 0.0])
    denominator = Denominator(moment, 1.0, 1e-8)
    assert measured(gradient, denominator) == pytest.approx(expected(gradient, denominator), rel=1e-6)
    assert not torch.tensor(measured(torch.tensor([float("inf"), 1.0]), None)[0]).isfinite()
    assert not torch.tensor(measured(torch.tensor([float("nan"), 1.0]), denominator_of(2))[1]).isfinite()


def denominator_of(size: int) -> Denominator:
    return Denominator(torch.ones(size), 1.0, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_preconditioner_is_the_adam_of_each_group(dtype: torch.dtype) -> None:
    """With SGD's steps of the reciprocal denominators the same weights: amsgrad, betas and eps of each group."""
    parameters = [torch.nn.Parameter(torch.randn(3, dtype=dtype)) for _ in range(2)]
    groups = [
        {"params": parameters[:1], "betas": (0.0, 0.9), "eps": 1e-2, "amsgrad": True},
        {"params": parameters[1:], "betas": (0.0, 0.6), "eps": 1e-1},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for size in (5.0, 0.1):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = size * torch.randn(3, dtype=dtype)
        optimizer.step()
    found = adam_preconditioner(optimizer, parameters)
    known = preconditioner_of(optimizer)
    assert found is not None and known is not None
    for parameter, old, weight in zip(parameters, before, found, strict=True):
        assert parameter.grad is not None
        step = as_real((old - parameter).detach())
        torch.testing.assert_close(step, 0.1 * weight * as_real(parameter.grad), rtol=1e-4, atol=1e-6)
        wanted = [squared_norm([parameter.grad], None), squared_norm([parameter.grad], [weight])]
        assert measured(parameter.grad, known.denominators()[parameter]) == pytest.approx(wanted, rel=1e-5)
