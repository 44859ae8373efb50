"""Messages of bytes between single ranks of a group, over MPI or over c10d's gloo.

A mailbox promises little, so that an exchange can be scheduled on top of it: messages from one rank to another with
one tag arrive in order, a receive takes a message up to its buffer's size, and who waits has a deadline and learns who
did not come. Nobody sends more than a piece of a bucket at once, so no message nears MPI's limit of 2 GiB.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ddp.errors import PeerLostError, TransportError, UsageError
from ddp.topology import from_environment
from ddp.transport.nodes import Place, gather, places

if TYPE_CHECKING:
    from mpi4py import MPI

Bytes = NDArray[np.uint8]
_GOODBYE = 99  # a tag
_LEFT, _FAILED = 1, 2
_YIELDING_SECONDS = 3e-4
_SHORT_SLEEP_SECONDS, _LONG_SLEEP_SECONDS = 20e-6, 2e-3
_PATIENCE_SECONDS = 0.02  # then look whether the peer is still there, and sleep longer
_ABANDONED: list[object] = []  # memory that MPI may still write to, although nobody waits for it


class Mailbox(ABC):
    """Between the ranks of one group; peers are its ranks.

    Args:
        group: takes CPU tensors (None: the default group).
        timeout_seconds: how long a rank may stay away before the others give it up.
        grace_seconds: on top of that, for a peer that may itself be waiting for somebody and should tell.

    Attributes:
        places: where each rank runs.
        wait_seconds: time spent waiting so far.
        sent_bytes: shape (world_size,): what was sent to each rank.
        subject: what is being exchanged, for messages of errors.
        waits_for: told which peer this rank begins to wait for, and None once that came.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float, grace_seconds: float = 0.0) -> None:
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.places: Sequence[Place] = places(group)
        self.sent_bytes = [0] * self.world_size
        self.wait_seconds = 0.0
        self.subject = "a message"
        self.waits_for: Callable[[int | None], None] = lambda peer: None
        self._timeout_seconds, self._grace_seconds = timeout_seconds, grace_seconds

    @abstractmethod
    def post_send(self, peer: int, message: Bytes, tag: int) -> Any:
        """Begin to send; `message` must stay as it is until the returned handle was waited for."""

    @abstractmethod
    def post_receive(self, peer: int, space: Bytes, tag: int) -> Any:
        """Begin to receive a message of at most len(space) bytes."""

    @abstractmethod
    def wait(self, peer: int, handle: Any) -> None:
        """Wait until what was begun with `peer` is done.

        Raises:
            PeerLostError: names `peer`, which is gone or did not come before the deadline.
        """

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Tell the others, where they can be told, and let go; nothing may be on its way unless `failed`."""

    def bytes_to_other_hosts(self) -> int:
        """What this rank has sent so far to ranks with another host name."""
        here = self.places[self.rank].host
        return sum(sent for place, sent in zip(self.places, self.sent_bytes, strict=True) if place.host != here)

    def _late(self, peer: int) -> PeerLostError:
        return PeerLostError(
            f"{self.places[peer]} did not bring {self.subject} within {self._timeout_seconds:g} s "
            f"(transport.timeout_seconds) to rank {self.rank}: it hangs, is stopped, or took another path "
            "through the program",
            lost_rank=peer,
        )

    def _gone(self, peer: int, how: str) -> PeerLostError:
        return PeerLostError(
            f"{self.places[peer]} {how} while rank {self.rank} waited for it with {self.subject}", lost_rank=peer
        )


class MpiMailbox(Mailbox):
    """Non-blocking MPI messages in a communicator of their own, polled: MPI makes progress only while it is asked.

    Who waits offers its core to others between the questions, and soon sleeps shortly.

    Raises:
        UsageError: the ranks of `group` are not in one world of MPI.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float, grace_seconds: float = 0.0) -> None:
        super().__init__(group, timeout_seconds, grace_seconds)
        self._mpi = import_mpi(self.world_size)
        self._under_way: dict[int, tuple[MPI.Request, Bytes]] = {}
        self._comm = self._communicator(group)
        self._pid, self._closing = os.getpid(), False

    def _communicator(self, group: dist.ProcessGroup | None) -> MPI.Intracomm:
        world = self._mpi.COMM_WORLD
        everyone = gather(np.array([world.Get_rank(), world.Get_size()]), group)
        ranks = [int(rank) for rank in everyone[:, 0]]
        if len(set(ranks)) != self.world_size:
            raise UsageError(
                f"{self.world_size} ranks are in worlds of MPI of {sorted(set(everyone[:, 1].tolist()))} ranks: "
                'start all of them with one mpirun, or use transport "auto"'
            )
        return world.Create_group(world.Get_group().Incl(ranks))

    def post_send(self, peer: int, message: Bytes, tag: int) -> MPI.Request:
        self.sent_bytes[peer] += len(message)
        return self._begun(self._comm.Isend((message, self._mpi.BYTE), peer, tag), message)

    def post_receive(self, peer: int, space: Bytes, tag: int) -> MPI.Request:
        return self._begun(self._comm.Irecv((space, self._mpi.BYTE), peer, tag), space)

    def _begun(self, request: MPI.Request, memory: Bytes) -> MPI.Request:
        self._under_way[id(request)] = (request, memory)
        return request

    def wait(self, peer: int, handle: MPI.Request) -> None:
        self.waits_for(peer)
        self._wait(peer, handle)
        self.waits_for(None)
        self._under_way.pop(id(handle), None)

    def _wait(self, peer: int, handle: MPI.Request) -> None:
        began = time.perf_counter()
        try:
            if not handle.Test():
                self._poll(peer, handle, began)
        except self._mpi.Exception as error:
            raise TransportError(f"MPI failed between rank {self.rank} and {self.places[peer]}: {error}") from error
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _poll(self, peer: int, handle: MPI.Request, began: float) -> None:
        while time.perf_counter() - began < _YIELDING_SECONDS:
            if handle.Test():
                return
            os.sched_yield()
        while not handle.Test():
            waited = time.perf_counter() - began
            if self._closing:
                raise TransportError(f"rank {self.rank} closed its transport while it waited for {self.places[peer]}")
            if waited < _PATIENCE_SECONDS:
                time.sleep(_SHORT_SLEEP_SECONDS)
                continue
            if (how := self._departure(peer)) and not handle.Test():  # what it sent before it went still counts
                raise self._gone(peer, how)
            if waited > self._timeout_seconds + self._grace_seconds:
                raise self._late(peer)
            time.sleep(_LONG_SLEEP_SECONDS if waited > 1 else 5 * _SHORT_SLEEP_SECONDS)

    def _departure(self, peer: int) -> str:
        """Empty while `peer` has not said goodbye."""
        status = self._mpi.Status()
        if not self._comm.Iprobe(peer, _GOODBYE, status):
            return ""
        return "failed" if status.Get_count(self._mpi.BYTE) == _FAILED else "left"

    def close(self, *, failed: bool) -> None:
        if os.getpid() != self._pid or self._mpi.Is_finalized():
            return
        self._closing = True
        word = np.zeros(_FAILED if failed else _LEFT, np.uint8)  # said by its length: a probe can read it
        said = [self._comm.Isend((word, self._mpi.BYTE), peer, _GOODBYE) for peer in self._peers()]
        if failed or self._under_way or not self._hear_goodbyes(said):
            _ABANDONED.extend((self, word, said))  # with all that is under way: MPI may write there to the end
        else:
            self._comm.Free()

    def _hear_goodbyes(self, said: list[MPI.Request]) -> bool:
        """Whether all others have gone, too: then nothing is left in the communicator."""
        spaces = [np.zeros(_FAILED, np.uint8) for _ in self._peers()]
        heard = [
            self._comm.Irecv((space, self._mpi.BYTE), peer, _GOODBYE)
            for peer, space in zip(self._peers(), spaces, strict=True)
        ]
        deadline = time.perf_counter() + 1.0
        while time.perf_counter() < deadline:
            if self._mpi.Request.Testall([*said, *heard]):
                return True
            time.sleep(_SHORT_SLEEP_SECONDS)
        for request in heard:
            if request != self._mpi.REQUEST_NULL:
                request.Cancel()
                request.Wait()
        return False

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.world_size) if peer != self.rank]


class C10dMailbox(Mailbox):
    """gloo's sends and receives in `group`. Its waits end a connection that is late, so a deadline is final."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float, grace_seconds: float = 0.0) -> None:
        super().__init__(group, timeout_seconds, grace_seconds)
        self._group = group
        self._timeout = timedelta(seconds=timeout_seconds + grace_seconds)
        self._tags = _tags_of_its_own(group)

    def post_send(self, peer: int, message: Bytes, tag: int) -> dist.Work:
        self.sent_bytes[peer] += len(message)
        try:
            work = dist.isend(torch.from_numpy(message), group=self._group, group_dst=peer, tag=self._tags + tag)
        except RuntimeError as error:
            raise self._gone(peer, _cause(error)) from error
        assert work is not None
        return work

    def post_receive(self, peer: int, space: Bytes, tag: int) -> dist.Work:
        try:
            work = dist.irecv(torch.from_numpy(space), group=self._group, group_src=peer, tag=self._tags + tag)
        except RuntimeError as error:
            raise self._gone(peer, _cause(error)) from error
        assert work is not None
        return work

    def wait(self, peer: int, handle: dist.Work) -> None:
        began = time.perf_counter()
        self.waits_for(peer)
        try:
            handle.wait(self._timeout)
            self.waits_for(None)
        except RuntimeError as error:
            if "Timed out waiting" in str(error):
                raise self._late(peer) from error
            raise self._gone(peer, _cause(error)) from error
        finally:
            self.wait_seconds += time.perf_counter() - began

    def close(self, *, failed: bool) -> None:
        """Nothing of its own: the group belongs to whoever made it, and its end is what others notice."""


def import_mpi(world_size: int) -> Any:
    """mpi4py's MPI.

    Raises:
        UsageError: this process was not started by mpirun, and would be a world of its own.
    """
    topology = from_environment(os.environ)
    if "mpi4py.MPI" not in sys.modules and world_size > 1 and not topology.under_mpi:
        started = "torchrun" if topology.launcher == "torchrun" else "no mpirun"
        raise UsageError(
            f'transport "mpi" under {started}: every process would be its own world of MPI; '
            'start the ranks with mpirun, or use transport "auto"'
        )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: its shared library of MPI is missing
        raise UsageError(f'transport "mpi" needs mpi4py ({error}): pip install "ddp-noise-scale[mpi]"') from None
    return MPI


def _tags_of_its_own(group: dist.ProcessGroup | None) -> int:
    """The first of 100 tags that no other mailbox of these ranks uses. Collective."""
    global _mailboxes
    _mailboxes = int(gather(np.array([_mailboxes + 1]), group).max())
    return 100 * _mailboxes


_mailboxes = 0


def _cause(error: RuntimeError) -> str:
    return f"was lost ({str(error).splitlines()[0]})"
