"""Which transport a process group gets."""

from __future__ import annotations

import logging
from typing import cast

import torch.distributed as dist

from ddp.errors import TransportError, UsageError
from ddp.transport.base import Transport
from ddp.transport.c10d import C10dTransport
from ddp.transport.shared_memory import SharedMemoryTransport, attach_segment

logger = logging.getLogger("ddp.transport")
NAMES = ("auto", "shared_memory", "c10d")


def select_transport(
    name: str, device_type: str, timeout_seconds: float, group: dist.ProcessGroup | None = None
) -> Transport:
    """The transport called `name`, or for "auto" shared memory on one node's CPUs and c10d elsewhere. Collective.

    Raises:
        UsageError: an unknown name, or shared memory where it cannot be had.
    """
    if name not in NAMES:
        raise UsageError(f"unknown transport {name!r}; valid: {', '.join(NAMES)}")
    if name == "shared_memory" and device_type != "cpu":
        raise UsageError(f'transport "shared_memory" averages CPU gradients, the model is on {device_type}; use "auto"')
    if name != "c10d" and device_type == "cpu":
        try:
            return _shared_memory(group, timeout_seconds)
        except TransportError as refusal:
            if name == "shared_memory":
                raise UsageError(f'transport "shared_memory": {refusal}; use "auto" or "c10d"') from None
            if dist.get_rank(group) == 0:
                logger.warning("gradients go through c10d: %s", refusal)
    return C10dTransport(group, _control_group(group))


def _shared_memory(group: dist.ProcessGroup | None, timeout_seconds: float) -> Transport:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    segment = attach_segment(_control_group(group)) if world_size > 1 else None
    return SharedMemoryTransport(segment, rank, world_size, timeout_seconds)


def _control_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of the same ranks that takes CPU tensors: `group` itself where it can. Collective."""
    if "gloo" in str(dist.get_backend_config(group)) or "mpi" in str(dist.get_backend_config(group)):
        return group
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    return cast(
        dist.ProcessGroup, dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    )  # never the non-member's number
