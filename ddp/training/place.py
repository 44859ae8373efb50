"""Where a rank works: its device, threads and cores, the process group and the transport. Opened before anything of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ddp.board import PhaseBoard
from ddp.errors import PeerLostError
from ddp.job import Job
from ddp.process_group import initialise, shutdown
from ddp.roll import Roll, open_roll
from ddp.topology import Topology
from ddp.training.agreement import together
from ddp.training.memory import keep_freed_memory
from ddp.training.resources import choose_device, open_transport, pinned, refuse_worlds_of_one, threads_per_rank
from ddp.training.signals import StopRequest, stop_on_signals
from ddp.transport.comm_hook import GradientExchange


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank has of its machine and its peers."""

    job: Job
    topology: Topology
    device: torch.device
    stop: StopRequest
    roll: Roll
    cores: frozenset[int]


@contextmanager
def opened_place(job: Job, topology: Topology, board: PhaseBoard | None = None) -> Iterator[Place]:
    """The rank's place, as the job's tables say; the process group ends with it. Collective.

    Args:
        board: where this rank says what it is doing; a new one where left out.

    Raises:
        UsageError: the job cannot run here.
    """
    device = choose_device(job.run.device, topology)
    refuse_worlds_of_one(job.transport, topology)
    torch.set_num_threads(job.run.threads_per_rank or threads_per_rank(topology))
    if device.type == "cpu":
        keep_freed_memory()
    board = board or PhaseBoard.make(topology.rank)
    board.enter("set-up", 0)
    store = initialise(topology, device.type, job.transport.timeout_seconds)
    with stop_on_signals() as stop:
        roll = open_roll(board, store)
        with roll.naming_the_lost(), pinned(job.transport.pin) as cores:
            yield Place(job, topology, device, stop, roll, cores)
            shutdown()  # a signal while rank 0 writes the report comes too late to stop anything


@contextmanager
def opened_exchange(place: Place) -> Iterator[GradientExchange]:
    """The gradient data plane of one model; the other ranks know at once if this one fails. Collective."""
    transport = together(lambda: open_transport(place.job.transport, place.device))
    exchange = GradientExchange(transport)
    try:
        yield exchange
    except BaseException as error:
        exchange.transport.close(failed=not isinstance(error, PeerLostError))
        raise
    exchange.transport.close()
