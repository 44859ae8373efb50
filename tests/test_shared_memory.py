"""What shared memory adds to the contract: sums per parameter, slices for many ranks, halves, wire formats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp.errors import TransportError
from ddp.transport.base import BucketState
from ddp.transport.ring import CHUNK_BYTES, attach_segment, result_bytes
from ddp.transport.select import select_transport
from ddp.transport.shared_memory import SharedMemoryTransport
from ranks import RankPool, process_group

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHUNK = CHUNK_BYTES // 4
# Parameters of one bucket: one element, none at all, around a chunk and a block, several chunks.
LENGTHS = (1, 0, 77, 8191, 8193, CHUNK - 5, 1, 0, 2 * CHUNK + 1009)


def _gradient(rank: int, dtype: torch.dtype, size: int = sum(LENGTHS)) -> Tensor:
    generator = torch.Generator().manual_seed(7 + rank)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * (rank + 1) + 0.1 * rank).to(dtype)


def _weight(rank: int, world_size: int) -> float:
    return 2 * (rank + 1) / (world_size * (world_size + 1))


def _mean(world_size: int, dtype: torch.dtype, size: int = sum(LENGTHS)) -> tuple[Tensor, Tensor]:
    """In float64, and the sum of its terms' magnitudes, to which rounding is relative."""
    terms = [_weight(rank, world_size) * _gradient(rank, dtype, size).double() for rank in range(world_size)]
    return torch.stack(terms).sum(0), torch.stack(terms).abs().sum(0)


def _by_parameter(values: Tensor) -> list[float]:
    return [float(part.double().square().sum()) for part in values.split(LENGTHS)]


def _reduce_parameters(rank: int, world_size: int, store: str, dtypes: list[torch.dtype]) -> list[Any]:
    with process_group(rank, world_size, store):
        transport = select_transport("shared_memory", "cpu", 60.0)
        results = []
        for dtype in dtypes:
            state = BucketState.of(LENGTHS)
            for _ in range(2):  # the second time over what the first left
                bucket = _gradient(rank, dtype)
                reduction = transport.all_reduce_mean_(bucket, _weight(rank, world_size), state)
            results.append((bucket, reduction.own_squared_norm, reduction.mean_squared_norm, state))
        dist.barrier()
        transport.close()
        return [
            (bucket, own, mean, list(state.own_squared_norms), list(state.mean_squared_norms))
            for bucket, own, mean, state in results
        ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_sums_of_squares_of_every_parameter(rank_pool: RankPool, world_size: int) -> None:
    by_rank = rank_pool.run(world_size, _reduce_parameters, DTYPES, timeout=120)
    for position, dtype in enumerate(DTYPES):
        expected, terms = _mean(world_size, dtype)
        first = by_rank[0][position][0]
        bound = (2 * world_size if dtype in DTYPES[:2] else 1.01) * torch.finfo(dtype).eps
        assert bool(((first.double() - expected).abs() <= bound * terms + 1e-7 * terms).all())
        for rank in range(world_size):
            bucket, own, mean, own_parts, mean_parts = by_rank[rank][position]
            assert torch.equal(bucket, first)
            assert own_parts == pytest.approx(_by_parameter(_gradient(rank, dtype)), rel=2e-6)
            assert mean_parts == pytest.approx(_by_parameter(bucket), rel=2e-6)
            assert (own, mean) == pytest.approx((sum(own_parts), sum(mean_parts)), rel=1e-12)


SIXTEEN = 16


def _reduce_in_parts(rank: int, world_size: int, store: str, cuts: list[int]) -> list[Tensor]:
    with process_group(rank, world_size, store):
        transport = select_transport("shared_memory", "cpu", 60.0)
        results = []
        for dtype in DTYPES:
            gradient = _gradient(rank, dtype, cuts[-1])
            for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
                transport.all_reduce_mean_(gradient[start:stop], _weight(rank, world_size))
            results.append(gradient)
        dist.barrier()
        transport.close()
        return results


@pytest.mark.parametrize("world_size", [5, SIXTEEN])
def test_many_ranks_reduce_slices_to_the_same_bits_for_any_buckets(rank_pool: RankPool, world_size: int) -> None:
    size = 2 * CHUNK + 101
    whole = rank_pool.run(world_size, _reduce_in_parts, [size], timeout=200)
    parts = rank_pool.run(world_size, _reduce_in_parts, [1, 7, 4095, 9000, CHUNK + 3, size], timeout=200)
    for position, dtype in enumerate(DTYPES):
        expected, terms = _mean(world_size, dtype, size)
        reference = whole[0][position]
        bound = (2 * world_size if dtype in DTYPES[:2] else 1.01) * torch.finfo(dtype).eps + 2e-6
        assert bool(((reference.double() - expected).abs() <= bound * terms).all())
        for results in (whole, parts):
            assert all(torch.equal(results[rank][position], reference) for rank in range(world_size))


def _halves(rank: int, world_size: int, store: str, sizes: list[int]) -> list[Any]:
    """Both ways from one gradient: in halves piece by piece, and at once."""
    with process_group(rank, world_size, store):
        transport = select_transport("shared_memory", "cpu", 60.0)
        assert isinstance(transport, SharedMemoryTransport)
        results = []
        for dtype in DTYPES:
            whole, bucket = _gradient(rank, dtype), _gradient(rank, dtype)
            at_once, state = BucketState.of(LENGTHS), BucketState.of(LENGTHS)
            transport.all_reduce_mean_(whole, _weight(rank, world_size), at_once)
            own = mean = 0.0
            offset = 0
            for size in sizes:
                piece = bucket[offset : offset + size]
                out = torch.full(
                    (transport.slices_length(len(piece), dtype),), float("nan"), dtype=transport.sum_dtype(dtype)
                )
                own += transport.reduce_scatter(piece, _weight(rank, world_size), out, state, offset)
                mean += transport.all_gather(out, piece, state, offset)
                offset += size
            assert offset == len(bucket)
            results.append(
                (
                    torch.equal(whole, bucket),
                    np.allclose(state.own_squared_norms, at_once.own_squared_norms, rtol=1e-6),
                    np.allclose(state.mean_squared_norms, at_once.mean_squared_norms, rtol=1e-6),
                    np.isclose(own, np.sum(at_once.own_squared_norms), rtol=1e-6),
                    np.isclose(mean, np.sum(at_once.mean_squared_norms), rtol=1e-6),
                )
            )
        dist.barrier()
        transport.close()
        return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_two_halves_make_the_whole(rank_pool: RankPool, world_size: int) -> None:
    total = sum(LENGTHS)
    sizes = [5, 0, CHUNK + 3, total // 2, total - total // 2 - CHUNK - 8]
    for results in rank_pool.run(world_size, _halves, sizes, timeout=120):
        assert results == [(True,) * 5] * len(DTYPES)


def _odd_tails(rank: int, world_size: int, store: str) -> list[float]:
    """Lengths whose last chunk gives a late rank more than a full one does."""
    with process_group(rank, world_size, store):
        transport = select_transport("shared_memory", "cpu", 60.0)
        assert isinstance(transport, SharedMemoryTransport)
        errors = []
        for dtype in DTYPES:
            chunk = CHUNK_BYTES // dtype.itemsize
            for size in (chunk - 48, chunk - 17, chunk - 1, 2 * chunk - 48, 2 * chunk - 17, chunk + 33):
                bucket, state = _gradient(rank, dtype, size), BucketState.of([size])
                out = torch.empty(transport.slices_length(size, dtype), dtype=transport.sum_dtype(dtype))
                assert len(out) <= transport.largest_slices_length(size, dtype)
                transport.reduce_scatter(bucket, _weight(rank, world_size), out, state, 0)
                transport.all_gather(out, bucket, state, 0)
                expected, terms = _mean(world_size, dtype, size)
                bound = (2 * world_size if dtype in DTYPES[:2] else 1.01) * torch.finfo(dtype).eps + 2e-6
                errors.append(float(((bucket.double() - expected).abs() - bound * terms).max()))
        dist.barrier()
        transport.close()
        return errors


@pytest.mark.parametrize("world_size", [3, 5])
def test_halves_of_chunks_that_are_not_quite_full(rank_pool: RankPool, world_size: int) -> None:
    for errors in rank_pool.run(world_size, _odd_tails, timeout=120):
        assert max(errors) <= 0


def _travel_with_changing_weights(rank: int, world_size: int, store: str) -> float:
    """The accumulated error of int8, in units of what one step loses."""
    with process_group(rank, world_size, store):
        transport = select_transport("shared_memory", "cpu", 60.0, wire="int8")
        state, gradient = BucketState.of(LENGTHS), _gradient(rank, torch.float32)
        gradients = [_gradient(other, torch.float32).double() for other in range(world_size)]
        total = torch.zeros(sum(LENGTHS), dtype=torch.float64)
        for step in range(40):
            uneven = [0.95, 0.05] if step % 4 == 0 else [1.0, 0.0] if step % 4 == 1 else [0.5, 0.5]
            bucket = gradient.clone()
            transport.all_reduce_mean_(bucket, uneven[rank], state)
            total += bucket - uneven[0] * gradients[0] - uneven[1] * gradients[1]
        dist.barrier()
        transport.close()
        return float(total.abs().max()) / (max(float(each.abs().max()) for each in gradients) / 127)


def test_error_feedback_where_weights_change(rank_pool: RankPool) -> None:
    assert max(rank_pool.run(2, _travel_with_changing_weights, timeout=60)) <= 1.1


def _bring_different_types(rank: int, world_size: int, store: str) -> str:
    with process_group(rank, world_size, store):
        transport = select_transport("shared_memory", "cpu", 5.0)
        try:
            transport.all_reduce_mean_(torch.ones(3000, dtype=DTYPES[rank]), 0.5)
        except TransportError as error:
            return str(error)
        finally:
            transport.close(failed=True)
        return ""


def test_another_type_of_the_same_length_is_refused(rank_pool: RankPool) -> None:
    messages = rank_pool.run(2, _bring_different_types)
    assert all(messages) and any("another" in message for message in messages)


WIRES = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 127}  # of an element, of an element, of a block's largest


def _travel(rank: int, world_size: int, store: str, wire: str, rounds: int) -> Any:
    with process_group(rank, world_size, store):
        segment = attach_segment(None)
        transport = SharedMemoryTransport(segment, rank, world_size, 60.0, wire)
        transport.prepare([torch.float32])
        state = BucketState.of(LENGTHS)
        total = torch.zeros(sum(LENGTHS), dtype=torch.float64)
        for round_ in range(rounds):
            bucket = _gradient(rank, torch.float32)
            transport.all_reduce_mean_(bucket, _weight(rank, world_size), state)
            total += bucket
            if round_ == 0:
                first = bucket.clone()
        exact = torch.ones(1000, dtype=torch.float64) / 3
        transport.all_reduce_mean_(exact, _weight(rank, world_size))
        dist.barrier()
        transport.close()
        return first, total / rounds, list(state.own_squared_norms), exact


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("wire", list(WIRES))
def test_wire_formats_round_what_travels_and_int8_makes_up_for_it(
    rank_pool: RankPool, wire: str, world_size: int
) -> None:
    rounds = 24
    expected, _ = _mean(world_size, torch.float32)
    peaks = torch.stack([_gradient(rank, torch.float32).double().abs() for rank in range(world_size)]).amax(1)
    weighted = sum(_weight(rank, world_size) * float(peaks[rank]) for rank in range(world_size))
    results = rank_pool.run(world_size, _travel, wire, rounds, timeout=120)
    for rank, (first, average, own, exact) in enumerate(results):
        assert torch.equal(first, results[0][0])
        error = (first.double() - expected).abs().max()
        assert 0 < float(error) <= 0.51 * WIRES[wire] * weighted * (1 if wire == "int8" else 2)
        assert own == pytest.approx(_by_parameter(_gradient(rank, torch.float32)), rel=2e-6)  # of what was handed in
        assert torch.allclose(exact, torch.full_like(exact, 1 / 3), rtol=1e-15)  # float64 travels as it is
        if wire == "int8":  # what one round loses comes with the next: the average error falls as 1 / rounds
            assert float((average - expected).abs().max()) <= 1.1 * WIRES[wire] * weighted / rounds + 1e-6


def test_the_places_for_slices_hold_the_largest_slice() -> None:
    for world_size in range(1, 65):
        for element_bytes in (2, 4, 8):
            elements = CHUNK_BYTES // element_bytes
            each = math.ceil(elements / world_size / 16) * 16
            assert min(each, elements) * max(4, element_bytes) <= result_bytes(world_size)
