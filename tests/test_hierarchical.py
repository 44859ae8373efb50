"""The hierarchical transport on one machine whose ranks are said to be on two or three nodes; real memory, real messages.

That nodes are found out where there are several is for tests/multinode to show.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp.errors import PeerLostError, TransportError
from ddp.transport.base import ROW_LENGTH, BucketState
from ddp.transport.hierarchical import GRACE_SECONDS, HierarchicalTransport
from ddp.transport.mailbox import MpiMailbox
from ddp.transport.select import select_transport
from ddp.transport.shared_memory import SharedMemoryTransport
from mpi_environments import MpiEnvironment
from mpi_ranks import run_under_mpi
from ranks import RankFailure, RankPool, process_group, run_ranks
from reductions import Seen, check, reduce_all

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Layout = list[list[int]]
LAYOUTS: dict[str, Layout] = {
    "2 x 2": [[0, 1], [2, 3]],
    "2 x 2 mixed": [[0, 3], [1, 2]],
    "3 x 1": [[0], [1], [2]],
    "1 x 3": [[0, 1, 2]],
    "3 x 2": [[0, 1], [2, 3], [4, 5]],
}
SLICE_BYTES = 16 * 1024
SIZES = (0, 1, 1009, 4097, 13 * 4096 + 1017)  # with slices of 4,096 and 1 to 3 ranks a node: 5 to 14 pieces


def open_over(layout: Layout, wire: str = "gradient", timeout_seconds: float = 20.0) -> HierarchicalTransport:
    return HierarchicalTransport(None, timeout_seconds, wire, layout, SLICE_BYTES)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Once, outside of the ranks' deadlines, into the cache that they share."""
    SharedMemoryTransport(None, 0, 1, 1.0).prepare_halves(DTYPES)


def _reduce(rank: int, world_size: int, store: str, layout: Layout, wire: str, dtypes: Any) -> dict[Any, list[Seen]]:
    with process_group(rank, world_size, store):
        transport = open_over(layout, wire)
        seen = {dtype: reduce_all(transport, dtype, SIZES) for dtype in dtypes}
        dist.barrier()
        transport.close()
        return seen


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mean_and_squares(rank_pool: RankPool, layout: Layout) -> None:
    by_rank = rank_pool.run(sum(map(len, layout)), _reduce, layout, "gradient", DTYPES)
    for dtype in DTYPES:
        check([seen[dtype] for seen in by_rank], dtype, sizes=SIZES)


# Of the last chunk of these a late rank of three holds more than of a full one; one also ends a row of slices.
ODD_TAILS = {torch.bfloat16: (65_519, 786_416), torch.float32: (32_720,)}


def _reduce_odd_tails(rank: int, world_size: int, store: str, layout: Layout) -> dict[torch.dtype, list[Seen]]:
    with process_group(rank, world_size, store):
        transport = HierarchicalTransport(None, 30.0, "gradient", layout)
        seen = {dtype: reduce_all(transport, dtype, sizes) for dtype, sizes in ODD_TAILS.items()}
        dist.barrier()
        transport.close()
        return seen


def test_three_ranks_a_node_and_a_last_chunk_that_is_not_quite_full(rank_pool: RankPool) -> None:
    by_rank = rank_pool.run(6, _reduce_odd_tails, [[0, 1, 2], [3, 4, 5]], timeout=90)
    for dtype, sizes in ODD_TAILS.items():
        check([seen[dtype] for seen in by_rank], dtype, sizes=sizes)


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("layout", [LAYOUTS["2 x 2"], LAYOUTS["3 x 1"]], ids=["2 x 2", "3 x 1"])
def test_wire_formats(rank_pool: RankPool, layout: Layout, wire: str) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    by_rank = rank_pool.run(sum(map(len, layout)), _reduce, layout, wire, dtypes)
    for dtype in dtypes:
        check([seen[dtype] for seen in by_rank], dtype, wire, SIZES)


def _reduce_in_parts(rank: int, world_size: int, store: str, layout: Layout, wire: str, cuts: list[int]) -> Tensor:
    with process_group(rank, world_size, store):
        transport = open_over(layout, wire)
        gradient = torch.randn(cuts[-1], generator=torch.Generator().manual_seed(rank))
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
            transport.all_reduce_mean_(gradient[start:stop], 0.7 ** (rank + 1))
        dist.barrier()
        transport.close()
        return gradient


@pytest.mark.parametrize("wire", ["gradient", "bfloat16"])
def test_same_bits_for_any_buckets(rank_pool: RankPool, wire: str) -> None:
    layout, size = LAYOUTS["2 x 2"], 60_011
    whole = rank_pool.run(4, _reduce_in_parts, layout, wire, [size])[0]
    parts = rank_pool.run(4, _reduce_in_parts, layout, wire, [1, 7, 1000, 9003, 50_001, size])[0]
    assert torch.equal(whole, parts)


def _int8_over_steps(rank: int, world_size: int, store: str, layout: Layout) -> list[float]:
    """The largest error of the sum over the steps so far."""
    with process_group(rank, world_size, store):
        transport = open_over(layout, "int8")
        state, errors = BucketState.of([20_000]), []
        total, exact = torch.zeros(20_000, dtype=torch.float64), torch.zeros(20_000, dtype=torch.float64)
        for step in range(30):
            everyone = torch.randn(world_size, 20_000, generator=torch.Generator().manual_seed(step))
            bucket = everyone[rank].clone()
            transport.all_reduce_mean_(bucket, 1 / world_size, state)
            total += bucket
            exact += everyone.double().mean(dim=0)
            errors.append(float((total - exact).abs().max()))
        dist.barrier()
        transport.close()
        return errors


def test_error_feedback_between_nodes(rank_pool: RankPool) -> None:
    errors = rank_pool.run(4, _int8_over_steps, LAYOUTS["2 x 2"])[0]
    assert 0 < errors[0] < 0.05
    assert max(errors) < 0.05  # it does not grow


def _rows(rank: int, world_size: int, store: str, layout: Layout) -> list[Any]:
    with process_group(rank, world_size, store):
        transport = open_over(layout)
        rows = []
        for round_ in range(20):
            if round_ % 7 == rank:
                time.sleep(0.004)
            rows.append(transport.exchange_row(np.arange(float(ROW_LENGTH)) + 100 * rank + 1e4 * round_))
            if round_ % 3 == 0:
                transport.all_reduce_mean_(torch.ones(5), 1.0)
        dist.barrier()
        transport.close()
        return rows


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_reach_everyone_in_rank_order(rank_pool: RankPool, layout: Layout) -> None:
    world_size = sum(map(len, layout))
    for rows in rank_pool.run(world_size, _rows, layout):
        for round_, row in enumerate(rows):
            assert np.array_equal(row, np.arange(ROW_LENGTH) + 100.0 * np.arange(world_size)[:, None] + 1e4 * round_)


def _refused(rank: int, world_size: int, store: str) -> str:
    with process_group(rank, world_size, store):
        try:
            open_over([[0, 2], [1]])
        except TransportError as error:
            return str(error)
        return ""


def test_nodes_of_different_sizes_are_refused(rank_pool: RankPool) -> None:
    assert rank_pool.run(3, _refused) == ["nodes have different numbers of ranks: [2, 1]"] * 3


def _without_memory_on_one(rank: int, world_size: int, store: str) -> str:
    reserve = os.posix_fallocate
    with process_group(rank, world_size, store):
        try:
            if rank == 2:
                os.posix_fallocate = _no_memory
            open_over(LAYOUTS["2 x 2"])
        except TransportError as error:
            return str(error)
        finally:
            os.posix_fallocate = reserve
        return ""


def _no_memory(descriptor: int, offset: int, length: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_node_without_memory_is_told_on_all(rank_pool: RankPool) -> None:
    said = rank_pool.run(4, _without_memory_on_one)
    assert all("No space left" in each for each in said[2:]), said
    assert said[:2] == ["rank 2 cannot share its node's memory"] * 2


def _selected(rank: int, world_size: int, store: str, name: str, wire: str) -> list[Any]:
    with process_group(rank, world_size, store):
        transport = select_transport(name, "cpu", 20.0, wire=wire)
        bucket = torch.full((5000,), float(rank))
        transport.all_reduce_mean_(bucket, 1 / world_size)
        transport.complete()
        dist.barrier()
        transport.close()
        return [transport.name, float(bucket[0])]


@pytest.mark.parametrize("wire", ["gradient", "int8"])
def test_it_can_be_asked_for_on_one_node(rank_pool: RankPool, wire: str) -> None:
    for name, value in rank_pool.run(3, _selected, "hierarchical", wire):
        assert name == "hierarchical" and value == pytest.approx(1.0)


def _sent(rank: int, world_size: int, store: str, layout: Layout, wire: str) -> int:
    with process_group(rank, world_size, store):
        transport = open_over(layout, wire)
        transport.all_reduce_mean_(torch.ones(200_000), 0.25)
        dist.barrier()
        transport.close()
        return transport.wire_bytes_total


@pytest.mark.parametrize(("wire", "element_bytes"), [("gradient", 4), ("bfloat16", 2), ("int8", 1)])
@pytest.mark.parametrize("layout", [LAYOUTS["2 x 2"], LAYOUTS["3 x 1"]], ids=["2 x 2", "3 x 1"])
def test_a_node_sends_each_number_once_a_stage(
    rank_pool: RankPool, layout: Layout, wire: str, element_bytes: int
) -> None:
    by_rank = rank_pool.run(sum(map(len, layout)), _sent, layout, wire)
    expected = 2 * (len(layout) - 1) / len(layout) * 200_000 * element_bytes
    for ranks in layout:
        assert expected <= sum(by_rank[rank] for rank in ranks) <= 1.03 * expected


def _bad_value(rank: int, world_size: int, store: str, wire: str) -> tuple[float, float]:
    with process_group(rank, world_size, store):
        transport = open_over(LAYOUTS["2 x 2"], wire)
        bucket = torch.ones(5000)
        if rank == 3:
            bucket[4000] = math.nan
        reduction = transport.all_reduce_mean_(bucket, 0.25)
        dist.barrier()
        transport.close()
        return float(reduction.own_squared_norm), float(reduction.mean_squared_norm)


@pytest.mark.parametrize("wire", ["gradient", "bfloat16", "int8"])
def test_what_is_not_finite_shows_in_the_norms(rank_pool: RankPool, wire: str) -> None:
    by_rank = rank_pool.run(4, _bad_value, wire)
    assert [math.isfinite(own) for own, _ in by_rank] == [True, True, True, False]
    assert not any(math.isfinite(mean) for _, mean in by_rank)


def _stay_away(rank: int, world_size: int, store: str, absent: int) -> str:
    with process_group(rank, world_size, store):
        transport = open_over(LAYOUTS["2 x 2"], timeout_seconds=1.0)
        message = ""
        if rank != absent:
            try:
                transport.all_reduce_mean_(torch.ones(100), 0.25)
            except PeerLostError as error:
                message = str(error)
            transport.close(failed=True)
        else:
            time.sleep(3)
        return message


def test_who_stays_away_is_named_by_its_rank_among_all() -> None:
    said = run_ranks(4, _stay_away, 3)
    assert said[2].startswith("rank 3 (pid "), said  # on the same node
    assert "to rank 2" in said[2]
    assert said[1].startswith("rank 3 (") or "rank 3 " in said[1], said  # the same-numbered rank


def _stop_between_the_nodes(rank: int, world_size: int, store: str) -> str:
    """Rank 3 does its part inside its node, and then no more."""
    with process_group(rank, world_size, store):
        transport = open_over(LAYOUTS["2 x 2"], timeout_seconds=1.5)
        transport.all_reduce_mean_(torch.ones(3), 0.25)
        bucket, message = torch.ones(100), ""
        if rank == 3:
            shared = transport._shared
            out = torch.empty(shared.slices_length(100, torch.float32))
            shared.reduce_scatter(bucket, 0.25, out, BucketState.of([100]), 0)
            time.sleep(5)
            return message
        try:
            transport.all_reduce_mean_(bucket, 0.25)
        except PeerLostError as error:
            message = str(error)
        transport.close()
        return message


def test_a_rank_that_waits_for_another_node_is_not_blamed() -> None:
    said = run_ranks(4, _stop_between_the_nodes)
    assert said[0].startswith("rank 3 did not bring") and "to rank 1 (pid " in said[0], said
    assert all("rank 3 " in each for each in said[1:3]), said


def _die(rank: int, world_size: int, store: str) -> None:
    with process_group(rank, world_size, store):
        transport = open_over(LAYOUTS["2 x 2"], timeout_seconds=5.0)
        transport.all_reduce_mean_(torch.ones(3), 0.25)
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        transport.all_reduce_mean_(torch.ones(1_000_000), 0.25)


def test_a_killed_rank_ends_all() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(4, _die, timeout=30)
    assert "PeerLostError: rank 3 (pid " in caught.value.causes[2]
    assert "PeerLostError: rank 3 (pid " in caught.value.causes[1]
    assert "PeerLostError" in caught.value.causes[0]


def under_mpi(rank: int, world_size: int) -> list[Seen]:
    mailbox = MpiMailbox(None, 20.0, GRACE_SECONDS)
    transport = HierarchicalTransport(None, 20.0, "gradient", LAYOUTS["2 x 2"], SLICE_BYTES, mailbox=mailbox)
    seen = reduce_all(transport, torch.float32, SIZES)
    transport.exchange_row(np.zeros(ROW_LENGTH))
    transport.close()
    return seen


def test_over_mpi(mpi: MpiEnvironment, tmp_path: Path) -> None:
    check(run_under_mpi(mpi, 4, under_mpi, tmp_path), torch.float32, sizes=SIZES)
