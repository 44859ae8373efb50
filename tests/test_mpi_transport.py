"""The mpi transport under Open MPI and MPICH: one launch each for all sizes, dtypes, wire formats and worlds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ddp.errors import PeerLostError
from ddp.transport.base import ROW_LENGTH
from ddp.transport.mpi import MpiTransport
from mpi_environments import MpiEnvironment
from mpi_ranks import groups, run_under_mpi
from reductions import PIECE_BYTES, check, reduce_all

CASES = [
    (torch.float32, "gradient"),
    (torch.float64, "gradient"),
    (torch.bfloat16, "gradient"),
    (torch.float16, "gradient"),
    (torch.float32, "bfloat16"),
    (torch.float32, "int8"),
]


def everything(rank: int, world_size: int) -> dict[Any, Any]:
    """Worlds of 1 to 4 ranks: all cases, rows, a rank that stays away."""
    seen: dict[Any, Any] = {}
    for size, group in groups(world_size).items():
        if group is not None:
            seen[size] = _in_world(group)
        dist.barrier()
    transport = MpiTransport(None, 20.0)  # a bucket of several full pieces
    bucket = torch.full((900_001,), float(rank), dtype=torch.float32)
    transport.all_reduce_mean_(bucket, 0.25)
    seen["large"] = (bucket.unique().tolist(), transport.wire_bytes_total)
    transport.close()
    transport.close()  # safe twice
    seen["late"] = _stay_away(rank)
    return seen


def _in_world(group: dist.ProcessGroup) -> tuple[list[Any], list[Any]]:
    reductions, rows = [], []
    for dtype, wire in CASES:
        transport = MpiTransport(group, 20.0, wire, piece_bytes=PIECE_BYTES)
        reductions.append(reduce_all(transport, dtype))
        for round_ in range(20):
            rows.append(transport.exchange_row(np.arange(float(ROW_LENGTH)) + 100 * transport.rank + 1e4 * round_))
            transport.all_reduce_mean_(torch.ones(5), 1.0)
        transport.close()
    return reductions, rows


def _stay_away(rank: int) -> str:
    transport = MpiTransport(None, 0.6)
    said = ""
    if rank != 2:
        try:
            transport.all_reduce_mean_(torch.ones(100), 0.25)
        except PeerLostError as error:
            said = str(error)
    dist.barrier()
    transport.close(failed=True)
    return said


def test_under_mpi(mpi: MpiEnvironment, tmp_path: Path) -> None:
    by_rank = run_under_mpi(mpi, 4, everything, tmp_path)
    for world_size in range(1, 5):
        members = [by_rank[rank][world_size] for rank in range(world_size)]
        for position, (dtype, wire) in enumerate(CASES):
            check([reductions[position] for reductions, _ in members], dtype, wire)
        for _, rows in members:
            for index, row in enumerate(rows):
                expected = np.arange(ROW_LENGTH) + 100.0 * np.arange(world_size)[:, None] + 1e4 * (index % 20)
                assert np.array_equal(row, expected)
    for rank in range(4):
        assert by_rank[rank]["large"] == ([1.5], 0)
        if rank != 2:
            assert by_rank[rank]["late"].startswith("rank 2 (pid ")
            assert "did not bring 100 elements within 0.6 s" in by_rank[rank]["late"]
