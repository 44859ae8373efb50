"""The direct exchange over gloo's messages: sums, bits, squares, wire formats, error feedback, faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp.errors import TransportError
from ddp.transport.base import BucketState
from ddp.transport.mailbox import C10dMailbox
from ddp.transport.mpi import MpiTransport
from ddp.transport.row import ROW_LENGTH
from ranks import RankPool, process_group
from reductions import PIECE_BYTES, SIZES, Seen, check, reduce_all

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIRES = ("gradient", "bfloat16", "float16", "int8")


def open_over_gloo(wire: str = "gradient", timeout_seconds: float = 20.0) -> MpiTransport:
    return MpiTransport(None, timeout_seconds, wire, C10dMailbox(None, timeout_seconds), PIECE_BYTES)


def _reduce(rank: int, world_size: int, store: str, wire: str) -> dict[torch.dtype, list[Seen]]:
    with process_group(rank, world_size, store):
        transport = open_over_gloo(wire)
        seen = {dtype: reduce_all(transport, dtype) for dtype in DTYPES}
        dist.barrier()
        transport.close()
        return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("wire", WIRES)
def test_mean_and_squares(rank_pool: RankPool, world_size: int, wire: str) -> None:
    by_rank = rank_pool.run(world_size, _reduce, wire)
    for dtype in DTYPES:
        check([seen[dtype] for seen in by_rank], dtype, wire)


def _reduce_in_parts(rank: int, world_size: int, store: str, wire: str, cuts: list[int], dtype: torch.dtype) -> Tensor:
    with process_group(rank, world_size, store):
        transport = open_over_gloo(wire)
        gradient = torch.randn(cuts[-1], generator=torch.Generator().manual_seed(rank)).to(dtype)
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
            transport.all_reduce_mean_(gradient[start:stop], 0.7 ** (rank + 1))
        dist.barrier()
        transport.close()
        return gradient


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "wire"),
    [(torch.float32, "gradient"), (torch.float32, "bfloat16"), (torch.bfloat16, "gradient"), (torch.float64, "int8")],
)
def test_same_bits_for_any_buckets(rank_pool: RankPool, world_size: int, dtype: torch.dtype, wire: str) -> None:
    size = 30_011
    whole = rank_pool.run(world_size, _reduce_in_parts, wire, [size], dtype)[0]
    parts = rank_pool.run(world_size, _reduce_in_parts, wire, [1, 7, 1000, 9003, 20_001, size], dtype)[0]
    assert torch.equal(whole, parts)


def _repeat(rank: int, world_size: int, store: str, keep: bool, rounds: int) -> tuple[Tensor, Tensor]:
    """The sum over rounds of the averages, and of what they should have been (up to float32)."""
    with process_group(rank, world_size, store):
        transport = open_over_gloo("int8")
        state = BucketState.of([9000])
        total, exact = torch.zeros(9000, dtype=torch.float64), torch.zeros(9000, dtype=torch.float64)
        for round_ in range(rounds):
            generator = torch.Generator().manual_seed(round_)
            everyone = torch.randn(world_size, 9000, generator=generator)
            bucket = everyone[rank].clone()
            transport.all_reduce_mean_(bucket, 1 / world_size, state if keep else None)
            total += bucket
            exact += everyone.double().mean(dim=0)
        dist.barrier()
        transport.close()
        return total, exact


@pytest.mark.parametrize("world_size", [2, 3])
def test_error_feedback_makes_up_for_what_int8_leaves_out(rank_pool: RankPool, world_size: int) -> None:
    errors = {}
    for keep in (True, False):
        total, exact = rank_pool.run(world_size, _repeat, keep, 40)[0]
        errors[keep] = float((total - exact).abs().max())
    assert errors[True] < 0.06  # two roundings of half a step of about 3 / 127
    assert errors[False] > 2 * errors[True]  # a random walk of 40 steps


def _reduce_values(rank: int, world_size: int, store: str, values: list[list[float]], wire: str) -> Any:
    with process_group(rank, world_size, store):
        transport = open_over_gloo(wire)
        bucket = torch.tensor(values[rank])
        reduction = transport.all_reduce_mean_(bucket, 1.0 / world_size)
        dist.barrier()
        transport.close()
        return bucket, reduction.own_squared_norm, reduction.mean_squared_norm


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("wire", WIRES)
def test_what_is_not_finite_shows_in_the_norms(rank_pool: RankPool, bad: float, wire: str) -> None:
    results = rank_pool.run(3, _reduce_values, [[1.0, 2.0], [bad, 2.0], [0.0, 2.0]], wire)
    assert [math.isfinite(own) for _, own, _ in results] == [True, False, True]
    for averaged, _, mean in results:
        assert not math.isfinite(mean) and not math.isfinite(averaged[0])


def _bring_different_lengths(rank: int, world_size: int, store: str, lengths: list[int]) -> str:
    with process_group(rank, world_size, store):
        transport = open_over_gloo(timeout_seconds=5.0)
        try:
            transport.all_reduce_mean_(torch.ones(lengths[rank]), 0.5)
        except TransportError as error:
            return str(error)
        finally:
            dist.barrier()
            transport.close(failed=True)
        return ""


@pytest.mark.parametrize("lengths", [[10, 11], [4097, 9000, 9000], [3, 50_000], [100, 9000, 100]])
def test_different_lengths_are_refused(rank_pool: RankPool, lengths: list[int]) -> None:
    for rank, message in enumerate(rank_pool.run(len(lengths), _bring_different_lengths, lengths)):
        assert message.startswith(f"rank {rank} brought {lengths[rank]} elements to the all-reduce, rank "), message


def _count(rank: int, world_size: int, store: str, wire: str) -> list[int]:
    with process_group(rank, world_size, store):
        transport = open_over_gloo(wire)
        transport.all_reduce_mean_(torch.ones(60_000), 0.5)
        dist.barrier()
        assert transport.wire_bytes_total == 0  # all are on this host
        transport.close()
        return transport._mailbox.sent_bytes


@pytest.mark.parametrize(("wire", "element_bytes"), [("gradient", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_what_is_sent(rank_pool: RankPool, world_size: int, wire: str, element_bytes: int) -> None:
    """2 (M - 1) / M of the bucket, and little else."""
    for rank, sent in enumerate(rank_pool.run(world_size, _count, wire)):
        assert sent[rank] == 0
        expected = 2 * (world_size - 1) / world_size * 60_000 * element_bytes
        assert expected <= sum(sent) <= 1.03 * expected


def _twice(rank: int, world_size: int, store: str) -> list[list[float]]:
    """Two transports over the same ranks, used in turn."""
    with process_group(rank, world_size, store):
        first, second = open_over_gloo(), open_over_gloo()
        rows = []
        for _ in range(3):
            bucket = torch.full((5000,), float(rank))
            first.all_reduce_mean_(bucket, 0.5)
            second.all_reduce_mean_(bucket, 1.0)
            row = torch.arange(float(ROW_LENGTH), dtype=torch.float64).numpy() + rank
            rows.append([float(bucket[17]), *second.exchange_row(row)[:, 3], *first.exchange_row(row)[:, 0]])
        dist.barrier()
        first.close()
        second.close()
        return rows


def test_two_transports_over_one_group_keep_apart(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, _twice) == [[[1.0, 3.0, 4.0, 0.0, 1.0]] * 3] * 2


def test_the_cases_need_more_pieces_than_there_are_buffers() -> None:
    assert max(SIZES) * 4 > 5 * PIECE_BYTES
