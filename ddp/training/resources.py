"""What a run takes of its machine: a device, threads, cores of its own, and a transport between the ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ddp.errors import UsageError
from ddp.job import TransportSection
from ddp.topology import Topology
from ddp.transport.base import Transport
from ddp.transport.binding import Choice, pin
from ddp.transport.select import select_transport

logger = logging.getLogger("ddp.training")


def choose_device(name: str, topology: Topology) -> torch.device:
    """The device called `name`, or the best there is for "auto".

    Raises:
        UsageError: there is none for this rank.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError('run.device: "cuda" asked for, but torch finds no CUDA device here; use "cpu" or "auto"')
    if name == "cpu" or not available:
        return torch.device("cpu")
    if topology.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"run.device: local rank {topology.local_rank} has no CUDA device, this node has "
            f"{torch.cuda.device_count()}: start one rank a device"
        )
    device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    return device


def threads_per_rank(topology: Topology) -> int:
    """Cores a rank: mpirun may have shared them out already, which shows in cores that it kept for itself."""
    cores = os.sched_getaffinity(0)
    bound = topology.under_mpi and cores < os.sched_getaffinity(os.getppid())
    return max(1, len(cores) if bound else len(cores) // topology.local_world_size)


@contextmanager
def pinned(choice: Choice) -> Iterator[frozenset[int]]:
    """Keep this rank on cores of its own where that is wanted; yields what it had. Collective at its beginning."""
    cores = frozenset(os.sched_getaffinity(0))
    binding = pin(choice, None)
    if binding.cores is not None and dist.get_rank() == 0:
        logger.debug("ranks are pinned, rank 0 to cores %s", ", ".join(map(str, sorted(binding.cores))))
    try:
        yield cores
    finally:
        binding.release()


def open_transport(section: TransportSection, device: torch.device) -> Transport:
    """The transport of the job file. Collective."""
    return select_transport(
        section.name, device.type, section.timeout_seconds, wire=section.wire, overlap=section.overlap
    )


def refuse_worlds_of_one(section: TransportSection, topology: Topology) -> None:
    """MPI between ranks that torchrun has started would be as many worlds of one rank.

    Raises:
        UsageError: the job asks for that.
    """
    if section.name == "mpi" and topology.launcher == "torchrun":
        raise UsageError(
            'transport.name: "mpi" under torchrun: every process would be its own world; start the ranks with mpirun, '
            'or use "auto"'
        )
