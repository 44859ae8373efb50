"""All-reduce of float32 gradients on one node: ours, Gloo and Open MPI, beside scaling the same bytes in place.

    python benchmarks/all_reduce.py [--ranks 2] [--rounds 21] [--largest-bytes N] [--json FILE]

Ours includes both squared norms and the mean; the others only sum. All run in the same processes, in turn;
figures are medians in milliseconds of the slowest rank. "In place" is every rank scaling its own copy of the
same bytes at once, what an all-reduce that touches each byte once can reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ddp.transport.base import Transport
from ddp.transport.select import select_transport
from harness import Figures, interleaved_medians, machine, run, slowest_of_ranks, table

SIZES = {
    "4 KiB": 4 << 10,
    "64 KiB": 64 << 10,
    "1 MiB": 1 << 20,
    "25 MiB": 25 << 20,
    "100 MiB": 100 << 20,
    "400 MiB": 400 << 20,
}
CALLS, BYTES_A_ROUND = 100, 32 << 20
PEERS = ("Open MPI", "Gloo")


def measure(arguments: argparse.Namespace) -> Figures:
    """Seconds by size and contender; collective over all ranks."""
    from mpi4py import MPI

    transport = select_transport("shared_memory", "cpu", 120.0)
    figures: Figures = {}
    for label, size in SIZES.items():
        if size <= arguments.largest_bytes:
            figures[label] = slowest_of_ranks(_measure_size(size // 4, arguments.rounds, transport, MPI))
    transport.close()
    return figures


def _measure_size(elements: int, rounds: int, transport: Transport, mpi: Any) -> dict[str, float]:
    # Peers' sums double with every call: small numbers and few calls keep them finite.
    source = 1e-3 * torch.randn(elements, generator=torch.Generator().manual_seed(dist.get_rank()))
    bucket = source.clone()
    array, weight = bucket.numpy(), 1.0 / transport.world_size

    def prepare() -> None:
        bucket.copy_(source)
        mpi.COMM_WORLD.Barrier()

    contenders: dict[str, Callable[[], object]] = {
        "in place": lambda: bucket.mul_(1.0),
        "ours": lambda: transport.all_reduce_mean_(bucket, weight),
        "Open MPI": lambda: mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, array),
        "Gloo": lambda: dist.all_reduce(bucket),
    }
    calls = max(1, min(CALLS, BYTES_A_ROUND // (4 * elements)))
    return interleaved_medians(contenders, rounds=rounds, calls=calls, prepare=prepare)


def show(figures: Figures, ranks: int) -> str:
    names = ("in place", "ours", *PEERS)
    header = ["bytes", *names, "ours / in place", *(f"{peer} / ours" for peer in PEERS)]
    rows = [
        [
            label,
            *(f"{1e3 * row[name]:.3g}" for name in names),
            f"{row['ours'] / row['in place']:.2f}",
            *(f"{row[peer] / row['ours']:.1f}" for peer in PEERS),
        ]
        for label, row in figures.items()
    ]
    return f"All-reduce, {ranks} ranks, float32, ms ({machine()})\n\n{table(header, rows)}"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--largest-bytes", type=int, default=max(SIZES.values()))


if __name__ == "__main__":
    sys.exit(run(__doc__, options, measure, show))
