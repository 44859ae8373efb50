"""A piece of memory that the ranks of one node share, and how they find it.

Rank 0 makes an anonymous file (`memfd_create`): it has no name to leave behind, no limit of /dev/shm applies,
and it vanishes with the last process that maps it, whatever kills them. Where a sandbox refuses that, it is a file
in /dev/shm, of mode 0600, whose name is gone before anyone else could see it. Peers open either through
/proc/<pid>/fd/<fd>, which the kernel grants to the same user only. A random number at its start tells a
peer that it holds the right file: locality is decided by attaching, not by what a launcher said.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ddp.errors import TransportError

HEADER_BYTES = 4096
_UNREACHABLE = -1
_FOLDER = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Segment:
    """`size_bytes` of zeroed memory at `address`, the same on all ranks of `pids`."""

    memory: mmap.mmap
    address: int
    pids: tuple[int, ...]


def share(size_bytes: int, group: dist.ProcessGroup | None) -> Segment:
    """Make a segment that all ranks of `group` map. Collective over `group`, on CPU tensors.

    Raises:
        TransportError: on all ranks alike, where the memory cannot be had, or one of them cannot map it.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    descriptor, offer = _UNREACHABLE, torch.zeros(4, dtype=torch.int64)
    if rank == 0:
        descriptor, offer = create(size_bytes)
    dist.broadcast(offer, group_src=0, group=group)
    pid, remote, nonce, error = offer.tolist()
    if remote == _UNREACHABLE:
        raise TransportError(
            f"rank 0 cannot reserve {size_bytes:,} bytes of shared memory, neither as an anonymous file nor in "
            f"{_FOLDER}: {os.strerror(error)}; give the container more (--shm-size), or memory"
        )
    if rank != 0:
        descriptor = open_of(pid, remote, nonce)
    memory = _map(descriptor, size_bytes)
    everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(everyone, torch.tensor([_UNREACHABLE if memory is None else os.getpid()]), group=group)
    if descriptor != _UNREACHABLE:
        os.close(descriptor)  # not before: peers open it by its number
    pids = tuple(int(each) for each in everyone)
    if memory is None or _UNREACHABLE in pids:
        raise TransportError("the ranks cannot map each other's memory")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return Segment(memory, address, pids)


def _map(descriptor: int, size_bytes: int) -> mmap.mmap | None:
    """None where the file cannot be had or not be mapped."""
    if descriptor == _UNREACHABLE:
        return None
    try:
        return mmap.mmap(descriptor, size_bytes)
    except (OSError, ValueError):
        return None


def create(size_bytes: int) -> tuple[int, torch.Tensor]:
    """Rank 0: the file's descriptor, and (pid, descriptor, nonce, errno) for the peers."""
    nonce, reason = secrets.randbits(62), 0
    for make in (_anonymous_file, _nameless_file):
        try:
            descriptor = make()
        except OSError as error:
            reason = error.errno or 0
            continue
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)  # now, so that a limit is an error and no SIGBUS later
            os.pwrite(descriptor, np.int64(nonce).tobytes(), 0)
        except OSError as error:
            os.close(descriptor)
            reason = error.errno or 0
            continue
        return descriptor, torch.tensor([os.getpid(), descriptor, nonce, 0])
    return _UNREACHABLE, torch.tensor([0, _UNREACHABLE, 0, reason])


def _anonymous_file() -> int:
    return os.memfd_create("ddp-gradients", os.MFD_CLOEXEC)


def _nameless_file() -> int:
    descriptor, name = tempfile.mkstemp(prefix="ddp-gradients-", dir=_FOLDER)  # mode 0600
    os.unlink(name)
    return descriptor


def open_of(pid: int, remote: int, nonce: int) -> int:
    """The descriptor of another process's file, or _UNREACHABLE where it is not ours to see.

    On another node the same numbers may name a stranger's file: nothing but a plain file is opened, and only
    one that begins with the nonce is kept.
    """
    path = f"/proc/{pid}/fd/{remote}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return _UNREACHABLE
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _UNREACHABLE
    with suppress(OSError):
        if os.pread(descriptor, 8, 0) == np.int64(nonce).tobytes():
            return descriptor
    os.close(descriptor)
    return _UNREACHABLE
