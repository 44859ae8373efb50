"""Where the ranks of a group are: host and pid of each, and which of them can map each other's memory.

Ranks are on one node if they can open each other's files through /proc, whatever launcher or host name
says: that is what shared memory needs (see `segment`).
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ddp.transport.segment import create, open_of

_HOST_BYTES = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}, host {self.host})"


def gather(own: NDArray[np.int64], group: dist.ProcessGroup | None) -> NDArray[np.int64]:
    """Everyone's numbers, shape (world size, ...), over a group of CPU tensors. Collective."""
    everyone = [torch.zeros(own.shape, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, torch.from_numpy(own), group=group)
    return torch.stack(everyone).numpy()


def places(group: dist.ProcessGroup | None) -> tuple[Place, ...]:
    """The place of each rank of `group`. Collective."""
    host = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
    everyone = gather(np.concatenate([[os.getpid()], np.frombuffer(host, np.int64)]), group)
    return tuple(
        Place(rank, int(row[0]), row[1:].tobytes().rstrip(b"\0").decode(errors="replace"))
        for rank, row in enumerate(everyone)
    )


def nodes(group: dist.ProcessGroup | None) -> list[list[int]]:
    """The ranks of `group` by node, both in rank order. Collective."""
    rank = dist.get_rank(group)
    descriptor, offer = create(8)
    try:
        pid, remote, nonce, _ = offer.tolist()
        probes = gather(np.array([kernel_number(), pid, remote, nonce]), group)
        first = next((other for other in range(rank) if _reaches(probes[other], probes[rank])), rank)
        leaders = [int(leader) for leader in gather(np.array([first]), group)[:, 0]]  # also: all have tried
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return [[rank for rank, of in enumerate(leaders) if of == leader] for leader in sorted(set(leaders))]


def _reaches(probe: NDArray[np.int64], own: NDArray[np.int64]) -> bool:
    if probe[0] != own[0] or probe[2] < 0:  # under another kernel there is nothing to try
        return False
    descriptor = open_of(*(int(number) for number in probe[1:]))
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0


def kernel_number() -> int:
    """A number that all processes under this running kernel have in common, and hardly any others."""
    identity = ""
    with suppress(OSError):
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "little")
