"""Cores: which ones the ranks of a machine have, and pinning each rank to a share of its own.

A rank that wanders between cores, or shares one with another rank while a third core idles, makes all the others
wait in every step. Who shares a machine is told by the kernel's boot id: containers and network namespaces
have names of their own, but not cores.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

Choice = Literal["auto"] | bool
Cores = frozenset[int]

logger = logging.getLogger("ddp.transport")
_MOST_CORES = 4096
_NODE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Machine:
    """The ranks of a group on this rank's machine.

    Attributes:
        cores: what each of them may use, in rank order.
        place: this rank's among them.
        bound: whether something has given any of them fewer cores than the process that started it.
    """

    cores: tuple[Cores, ...]
    place: int
    bound: bool

    def share(self) -> float:
        """Cores that this rank can count on: one that k ranks may use counts 1 / k."""
        return sum(1.0 / sum(core in each for each in self.cores) for core in self.cores[self.place])


def look_around(group: dist.ProcessGroup | None) -> Machine:
    """The machine as the ranks of `group` see it. Collective over `group`, on CPU tensors."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.frombuffer(bytearray(_boot_id() + bytes([_is_bound()]) + _mask(_own_cores())), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    if world_size > 1:
        dist.all_gather(everyone, mine, group=group)
    else:
        everyone = [mine]
    reports = [bytes(each.tolist()) for each in everyone]
    here = [other for other in range(world_size) if reports[other][:_NODE_BYTES] == reports[rank][:_NODE_BYTES]]
    return Machine(
        cores=tuple(_cores_of(reports[other][_NODE_BYTES + 1 :]) for other in here),
        place=here.index(rank),
        bound=any(reports[other][_NODE_BYTES] for other in here),
    )


def has_core_to_spare(machine: Machine, threads: int, ranks_started: int = 1) -> bool:
    """Whether a rank that computes on `threads` threads has a core left for a communication thread.

    Args:
        ranks_started: on this machine, those outside the group included where that is known.
    """
    return machine.share() * min(1.0, len(machine.cores) / ranks_started) >= threads + 1


def share_out(cores: Sequence[int], ranks: int) -> list[Cores]:
    """Contiguous, equal but for one core; ranks beyond the cores begin again at the first."""
    if ranks > len(cores):
        return [frozenset({cores[rank % len(cores)]}) for rank in range(ranks)]
    cuts = [rank * len(cores) // ranks for rank in range(ranks + 1)]
    return [frozenset(cores[start:stop]) for start, stop in pairwise(cuts)]


def cores_to_pin_to(choice: Choice, machine: Machine, order: Mapping[int, tuple[int, ...]]) -> Cores | None:
    """This rank's share, or None where it is to be left as it is.

    Args:
        choice: True shares out in any case what the ranks have together; "auto" only where each rank gets a core
            and nothing else has bound them.
        order: a core's place in the machine, so that a share is neighbours: the threads of one core, of one socket.
    """
    ranks, together = len(machine.cores), frozenset[int]().union(*machine.cores)
    if choice is False:
        return None
    if choice == "auto" and (machine.bound or ranks > len(together) or len(set(machine.cores)) > 1):
        return None
    share = share_out(sorted(together, key=lambda core: order.get(core, (core,))), ranks)[machine.place]
    return None if share == machine.cores[machine.place] else share


@dataclass(slots=True)
class Binding:
    """A process whose threads are all pinned to `cores`, until `release`; None where nothing was changed."""

    cores: Cores | None = None
    _before: dict[int, Cores] = field(default_factory=dict)

    def release(self) -> None:
        """Give all threads back what they had; those made since get what the first one had. Safe to call twice."""
        before, self._before = self._before, {}
        if before:
            first = before.get(os.getpid()) or next(iter(before.values()))
            for thread in _threads():
                with suppress(OSError):
                    os.sched_setaffinity(thread, before.get(thread, first))


def pin(choice: Choice, group: dist.ProcessGroup | None) -> Binding:
    """Pin this process to its share of the machine's cores, as `choice` says. Collective over `group`.

    All threads there are move, such as torch's; threads and processes started later inherit it.
    """
    if choice is False:
        return Binding()
    cores = cores_to_pin_to(choice, look_around(group), core_order())
    return Binding() if cores is None else bind(cores)


def bind(cores: Cores) -> Binding:
    """Pin every thread of this process to `cores`; a refusal of the kernel's is logged and changes nothing else."""
    before: dict[int, Cores] = {}
    try:
        for thread in _threads():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                had = frozenset(os.sched_getaffinity(thread))
                os.sched_setaffinity(thread, cores)
                before[thread] = had
    except OSError as error:
        Binding(None, before).release()
        logger.warning("ranks stay unpinned: the kernel refuses (%s)", error.strerror)
        return Binding()
    return Binding(cores, before)


def core_order(root: Path = Path("/sys/devices/system/cpu")) -> dict[int, tuple[int, ...]]:
    """(socket, core, number) of each logical core; empty where the kernel does not say."""
    order: dict[int, tuple[int, ...]] = {}
    for folder in root.glob("cpu[0-9]*/topology"):
        number = int(re.sub(r"\D", "", folder.parent.name))
        with suppress(OSError, ValueError):
            socket, core = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
            order[number] = (socket, core, number)
    return order


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _own_cores() -> Cores:
    return frozenset(os.sched_getaffinity(0))


def _is_bound() -> bool:
    """Whether whoever started this process has cores that this process has not."""
    with suppress(OSError):
        return not os.sched_getaffinity(os.getppid()) <= os.sched_getaffinity(0)
    return False


def _boot_id() -> bytes:
    try:
        return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    except (OSError, ValueError):
        return uuid.uuid5(uuid.NAMESPACE_DNS, os.uname().nodename).bytes


def _mask(cores: Iterable[int]) -> bytes:
    return sum(1 << core for core in cores if core < _MOST_CORES).to_bytes(_MOST_CORES // 8, "little")


def _cores_of(mask: bytes) -> Cores:
    bits = int.from_bytes(mask, "little")
    return frozenset(core for core in range(bits.bit_length()) if bits >> core & 1)
