"""The same reductions for transports that send messages, and what must be true of their results.

`reduce_all` runs on every rank and returns what one rank saw; `check` compares all ranks' with float64 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp.transport.base import BucketState, Transport

PIECE_BYTES = 16 * 1024
# Of one element, swapped whole, of one piece, and of more pieces than there are buffers.
SIZES = (0, 1, 1009, 4096, 4097, 9 * 4096 + 1017)
ROUNDS = 2


@dataclass
class Seen:
    """Of one reduction on one rank."""

    average: Tensor
    own: float
    mean: float
    own_by_parameter: NDArray[np.float64]
    mean_by_parameter: NDArray[np.float64]


def gradients(world_size: int, size: int, dtype: torch.dtype, round_: int = 0) -> list[Tensor]:
    """One gradient a rank, each of its own scale and signs; the same list on every rank."""
    generator = torch.Generator().manual_seed(1000 * size + 10 * round_ + world_size)
    return [
        (torch.randn(size, generator=generator, dtype=torch.float64) * (r + 1) + r).to(dtype) for r in range(world_size)
    ]


def weights(world_size: int) -> list[float]:
    """Unequal, as an uneven last batch gives them."""
    total = sum(range(1, world_size + 1))
    return [(rank + 1) / total for rank in range(world_size)]


def lengths(size: int) -> list[int]:
    """Of the parameters of a bucket: some within a piece, one over several, one empty."""
    return [size // 7, 0, size // 5, size - size // 7 - size // 5]


def reduce_all(transport: Transport, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[Seen]:
    """Every size, each in several rounds with the same state, on this rank."""
    seen: list[Seen] = []
    rank, world_size = transport.rank, transport.world_size
    for size in sizes:
        state = BucketState.of(lengths(size))
        for round_ in range(ROUNDS):
            bucket = gradients(world_size, size, dtype, round_)[rank]
            reduction = transport.all_reduce_mean_(bucket, weights(world_size)[rank], state)
            transport.complete()
            seen.append(
                Seen(
                    reduction.bucket,
                    float(reduction.own_squared_norm),
                    float(reduction.mean_squared_norm),
                    np.array(state.own_squared_norms),
                    np.array(state.mean_squared_norms),
                )
            )
    return seen


def check(
    by_rank: list[list[Seen]], dtype: torch.dtype, wire: str = "gradient", sizes: tuple[int, ...] = SIZES
) -> None:
    """All ranks hold the same bits, close to the float64 sum, and the right squares."""
    world_size = len(by_rank)
    cases = [(size, round_) for size in sizes for round_ in range(ROUNDS)]
    for position, (size, round_) in enumerate(cases):
        parts = [gradient.double() for gradient in gradients(world_size, size, dtype, round_)]
        first = by_rank[0][position]
        if wire != "int8" or round_ == 0:  # later rounds make up for what earlier ones left out
            error, bound = _error(first.average, parts, dtype, wire)
            assert error <= bound, (size, round_, error, bound)
        for rank, seen in enumerate(ranks[position] for ranks in by_rank):
            assert torch.equal(seen.average, first.average), f"rank {rank} holds other bits at size {size}"
            assert seen.mean == first.mean, "clipping by it would tell the ranks apart"
            assert np.array_equal(seen.mean_by_parameter, first.mean_by_parameter)
            _check_squares(parts[rank], seen.own, seen.own_by_parameter)
            _check_squares(seen.average.double(), seen.mean, seen.mean_by_parameter)


def _error(average: Tensor, parts: list[Tensor], dtype: torch.dtype, wire: str) -> tuple[float, float]:
    """The largest error in units of the terms' sizes, and the largest that is due to rounding."""
    weighted = [weight * part for weight, part in zip(weights(len(parts)), parts, strict=True)]
    expected = sum(weighted, torch.zeros_like(parts[0]))
    if not len(expected):
        return 0.0, 0.0
    epsilon = torch.finfo(dtype).eps
    coarse = {"gradient": epsilon, "bfloat16": 2.0**-7, "float16": 2.0**-10, "int8": 1 / 127}[wire]
    if wire == "int8" and dtype != torch.float64:  # an error of the block's largest number, here of all
        terms = torch.full_like(expected, sum(float(term.abs().max()) for term in weighted))
    else:
        terms = sum((term.abs() for term in weighted), torch.zeros_like(expected)) + 1e-300
    widest = epsilon if dtype == torch.float64 else max(coarse, epsilon)
    return float(((average.double() - expected).abs() / terms).max()), 2 * len(parts) * widest


def _check_squares(values: Tensor, total: float, by_parameter: NDArray[np.float64]) -> None:
    expected = [float(part.square().sum()) for part in values.split(lengths(len(values)))]
    assert by_parameter == pytest.approx(expected, rel=2e-6, abs=1e-300)
    assert total == pytest.approx(sum(expected), rel=2e-6, abs=1e-300)
