"""What the all-reduce is compared with, each as a function that works on one bucket in place.

The peers only sum; ours averages and gives both squared norms. DeepSpeed is left out where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddp.transport.base import BucketState, Transport
from ddp.transport.select import NAMES, select_transport

IN_PLACE, COPY, GLOO, DEEPSPEED = "in place", "copy", "Gloo", "DeepSpeed"
TRANSPORTS = {name: each for name, each in {"ours": "shared_memory", "ours, mpi": "mpi"}.items() if each in NAMES}
FLOORS = (IN_PLACE, COPY)
Call = Callable[[], object]
Contender = Callable[[Tensor, Tensor, BucketState | None], Call]


class Contenders:
    """All that `wanted` names and that can be had here, set up once. Collective over all ranks."""

    def __init__(self, mpi_name: str, wanted: Iterable[str], wire: str) -> None:
        from mpi4py import MPI

        wanted = tuple(wanted)
        self._transports = {
            name: select_transport(TRANSPORTS[name], "cpu", 120.0, wire=wire) for name in TRANSPORTS if name in wanted
        }
        can_be_had: dict[str, Contender] = {
            IN_PLACE: lambda bucket, _, __: lambda: bucket.mul_(1.0),
            COPY: lambda bucket, source, _: lambda: bucket.copy_(source),
            **{name: _ours(transport) for name, transport in self._transports.items()},
            GLOO: lambda bucket, _, __: lambda: dist.all_reduce(bucket),
            mpi_name: lambda bucket, _, __: _mpi(MPI, bucket),
        }
        if DEEPSPEED in wanted and (sum_ := _deepspeed()) is not None:
            can_be_had[DEEPSPEED] = lambda bucket, _, __: lambda: sum_(bucket)
        self._made = {name: made for name, made in can_be_had.items() if name in wanted}

    def on(self, bucket: Tensor, source: Tensor, state: BucketState | None) -> Mapping[str, Call]:
        """One call of each contender on `bucket`; `source` holds what it began with."""
        return {name: made(bucket, source, state) for name, made in self._made.items()}

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _ours(transport: Transport) -> Contender:
    weight = 1.0 / transport.world_size

    def on(bucket: Tensor, _: Tensor, state: BucketState | None) -> Call:
        def call() -> None:
            reduction = transport.all_reduce_mean_(bucket, weight, state)
            if reduction.future is not None:
                transport.complete()
                reduction.future.wait()

        return call

    return on


def _mpi(mpi: Any, bucket: Tensor) -> Call:
    comm, in_place, spelled_out = mpi.COMM_WORLD, mpi.IN_PLACE, [bucket.numpy(), bucket.numel(), mpi.FLOAT]
    return lambda: comm.Allreduce(in_place, spelled_out)


def _deepspeed() -> Callable[[Tensor], object] | None:
    """DeepSpeed's sum through shared memory, compiled by rank 0 where no earlier run has done it."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run = torch.tensor([os.getpid()])
    dist.broadcast(run, 0)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(world_size), "MASTER_PORT": str(run.item())}
    builder = importlib.import_module("deepspeed.ops.op_builder.cpu").ShareMemCommBuilder()
    if rank == 0:
        builder.load(verbose=False)
    dist.barrier()
    builder.load(verbose=False).initialize(world_size, rank)
    dist.barrier()
    # It never removes its memory, which everyone has attached by now.
    segment = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}_{run.item()}_{rank}"
    Path("/dev/shm", segment).unlink(missing_ok=True)
    return torch.ops.deepspeed.inference_all_reduce_
