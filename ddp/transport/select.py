"""Which transport a process group gets: one table of who serves what, and one door, `select_transport`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from ddp.errors import TopologyError, TransportError, UsageError
from ddp.topology import from_environment
from ddp.transport.base import Transport
from ddp.transport.binding import has_core_to_spare, look_around
from ddp.transport.c10d import C10dTransport
from ddp.transport.hierarchical import HierarchicalTransport
from ddp.transport.mpi import MpiTransport
from ddp.transport.nodes import nodes
from ddp.transport.overlap import OverlappedTransport
from ddp.transport.ring import attach_segment
from ddp.transport.shared_memory import SharedMemoryTransport

logger = logging.getLogger("ddp.transport")
WIRES = ("gradient", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class Request:
    """What a transport is opened for. `control` is a group of the same ranks as `group` that takes CPU tensors.

    `automatic`: nobody asked for it by name.
    """

    timeout_seconds: float
    group: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    wire: str
    overlap: Literal["auto"] | bool
    automatic: bool


@dataclass(frozen=True, slots=True)
class Server:
    """One row of the table.

    Attributes:
        open: makes the transport, collectively; a TransportError on all ranks says why it cannot be had.
        accelerators: whether it averages gradients on other devices than CPUs.
        wires: whether gradients may travel as something narrower than they are.
        works_alone: whether it goes on without the hook's thread anyway, so that a thread of its own gains nothing.
    """

    open: Callable[[Request], Transport]
    accelerators: bool = False
    wires: bool = False
    works_alone: bool = False


def _shared_memory(request: Request) -> Transport:
    rank, world_size = dist.get_rank(request.group), dist.get_world_size(request.group)
    segment = attach_segment(request.control) if world_size > 1 else None
    return SharedMemoryTransport(segment, rank, world_size, request.timeout_seconds, request.wire)


def _c10d(request: Request) -> Transport:
    """On a thread it needs a group of its own: DDP has collectives on its group too, in no fixed order with these."""
    if request.overlap is not True:
        return C10dTransport(request.group, request.control)
    own = _new_group(request.group, "gloo", request.timeout_seconds)
    return C10dTransport(own, own)


def _mpi(request: Request) -> Transport:
    return MpiTransport(request.control, request.timeout_seconds, request.wire)


def _hierarchical(request: Request) -> Transport:
    """On a thread, too, no group of its own is needed: messages have tags, collectives only their order."""
    layout = nodes(request.control)
    if request.automatic and request.wire == "gradient" and len(layout[0]) == 1:
        raise TransportError("no two ranks share a node")
    return HierarchicalTransport(request.control, request.timeout_seconds, request.wire, layout)


SERVERS = {
    "shared_memory": Server(_shared_memory, wires=True),
    "hierarchical": Server(_hierarchical, wires=True),
    "mpi": Server(_mpi, wires=True),
    "c10d": Server(_c10d, accelerators=True, works_alone=True),
}
AUTOMATIC = ("shared_memory", "hierarchical", "c10d")  # the first that can be had
NAMES = ("auto", *SERVERS)


def select_transport(
    name: str,
    device_type: str,
    timeout_seconds: float,
    group: dist.ProcessGroup | None = None,
    *,
    wire: str = "gradient",
    overlap: Literal["auto"] | bool = False,
) -> Transport:
    """The transport called `name`, or for "auto" the first of `AUTOMATIC` that can be had. Collective.

    Args:
        timeout_seconds: how long a rank may stay away before the others give it up.
        wire: what gradients travel as: "gradient" (as they are), "bfloat16", "float16" or "int8".
        overlap: whether a thread averages while backward goes on; "auto" where there is a core to spare for it.

    Raises:
        UsageError: an unknown name, or a transport that cannot be had here or does not do what is asked.
    """
    candidates = _candidates(name, device_type, wire)
    request = Request(
        timeout_seconds, group, control_group(group), wire, overlap if device_type == "cpu" else False, name == "auto"
    )
    transport = _open_first(candidates, request)
    if not _overlaps(SERVERS[transport.name], request):
        return transport
    if transport.rank == 0:
        logger.debug("%s averages on a thread of its own, while backward goes on", transport.name)
    return OverlappedTransport(transport)


def control_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of the same ranks that takes CPU tensors: `group` itself where it can. Collective."""
    backend = str(dist.get_backend_config(group))
    return group if "gloo" in backend or "mpi" in backend else _new_group(group, "gloo", None)


def _candidates(name: str, device_type: str, wire: str) -> list[str]:
    """Names to try, best first; what is asked for by name is refused if it cannot do what is asked."""
    if name not in NAMES:
        raise UsageError(f"unknown transport {name!r}; valid: {', '.join(NAMES)}")
    if wire not in WIRES:
        raise UsageError(f"unknown wire format {wire!r}; valid: {', '.join(WIRES)}")
    refusals = {each: _refusal(each, device_type, wire) for each in (AUTOMATIC if name == "auto" else (name,))}
    able = [each for each, refusal in refusals.items() if refusal is None]
    if not able:
        raise UsageError("; ".join(refusal for refusal in refusals.values() if refusal))
    return able


def _refusal(name: str, device_type: str, wire: str) -> str | None:
    server = SERVERS[name]
    if device_type != "cpu" and not server.accelerators:
        return f'transport "{name}" averages CPU gradients, the model is on {device_type}; use "auto"'
    if wire != "gradient" and not server.wires:
        offering = ", ".join(each for each, other in SERVERS.items() if other.wires) or "no transport"
        return f'transport "{name}" sends gradients as they are, wire "{wire}" is offered by {offering}'
    return None


def _open_first(names: list[str], request: Request) -> Transport:
    """The first of `names` that can be had; rank 0 says what was passed over."""
    reasons: list[str] = []
    for name in names:
        try:
            transport = SERVERS[name].open(request)
        except TransportError as error:
            reasons.append(str(error))
            continue
        if reasons and transport.rank == 0:
            level = logging.INFO if name == "hierarchical" else logging.WARNING  # what several nodes are made for
            logger.log(level, "gradients go through %s: %s", name, "; ".join(reasons))
        return transport
    raise UsageError(f'transport "{names[-1]}": {"; ".join(reasons)}; use "auto" or "c10d"')


def _overlaps(server: Server, request: Request) -> bool:
    if request.overlap != "auto":
        return request.overlap
    if server.works_alone or dist.get_world_size(request.group) == 1:
        return False
    started = 1
    with suppress(TopologyError):
        started = from_environment(os.environ).local_world_size  # the group may be some of them
    return has_core_to_spare(look_around(request.control), torch.get_num_threads(), started)


def _new_group(group: dist.ProcessGroup | None, backend: str, timeout_seconds: float | None) -> dist.ProcessGroup:
    """Another group of the same ranks."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    made: Any = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)  # never the non-member's number
