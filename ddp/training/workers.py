"""The processes that fetch micro-batches for a rank: how one is started, asked, heard and ended.

A worker is a fork of its rank, as users expect of a data loader: the data set need not be pickled. It is forked before
the transport, the metrics endpoint and the record exist, so it keeps none of them open. It does nothing on its own
account: it leaves signals to the rank, and the kernel kills it when the rank is gone, however that ended.

These are not torch's DataLoader, whose processes are ended by the very signal that they have to ignore, whose handler
of SIGCHLD raises wherever the rank is just then, and whose rank waits for ever where a batch cannot be
pickled or put into /dev/shm, or a worker is killed while it writes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import multiprocessing
import os
import random
import signal
import socket
import struct
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ddp import errors
from ddp.errors import DdpError, LoaderError
from ddp.tasks.base import Batch
from ddp.training.data import BatchPlan, fetcher
from ddp.training.parcels import pack, unpack
from ddp.training.sampling import Sampler

LEFT_TO_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
END_SECONDS = 5.0  # for the kernel to take down a killed process
_READY = b"ready"
_REQUEST = struct.Struct("=qqq")
_ANSWER_BYTES = 1 << 18  # a message's, at most; the kernel takes no much longer ones
_TEXT = 8_000  # characters of an error's text and of its traceback


@dataclass(frozen=True, slots=True)
class Request:
    """A micro-batch: positions `start` to `stop` in the order of `epoch`."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Sent in place of a batch: what fetching it raised."""

    kind: str
    text: str
    traceback: str


class Worker:
    """One process, from the rank's side. Answers come in the order of requests."""

    def __init__(
        self,
        number: int,
        rank: int,
        dataset: Dataset[Any],
        plan: BatchPlan,
        cores: Collection[int] | None,
        sampler: Sampler,
    ) -> None:
        self.number, self._rank = number, rank
        self._socket, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=_serve,
            args=(far_end, self._socket, dataset, plan, os.getpid(), cores, sampler),
            name=f"data worker {number} of rank {rank}",
            daemon=True,
        )
        try:
            with warnings.catch_warnings(), far_end:
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: of the rank's other threads
                self._process.start()
        except BaseException:
            self._socket.close()
            raise

    @property
    def process_id(self) -> int:
        return self._process.pid or 0

    def is_ready(self, seconds: float) -> bool:
        """Whether it has come up within so long; a fork of a process with threads may find a lock taken for ever."""
        wait([self._socket, self._process.sentinel], seconds)
        with suppress(BlockingIOError, ConnectionError):
            return self._socket.recv(len(_READY), socket.MSG_DONTWAIT) == _READY
        return False

    def ask(self, request: Request) -> None:
        """Have it fetched. The worker is not waited for, so long as a few hundred requests at most are open."""
        try:
            self._socket.send(_REQUEST.pack(request.epoch, request.start, request.stop))
        except OSError as error:
            raise self._lost() from error

    def tell(self, order: NDArray[np.int64], epoch: int) -> None:
        """What the order of `epoch` is, for all that is asked from now on."""
        file = os.memfd_create("ddp order", os.MFD_CLOEXEC)
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(order.data)
            socket.send_fds(self._socket, [_REQUEST.pack(epoch, 0, len(order))], [file])
        except OSError as error:
            raise self._lost() from error
        finally:
            os.close(file)

    def answer(self) -> Batch | Failed:
        """What became of the oldest request, once the worker has seen to it."""
        message, files, flags = self._receive()
        if flags & socket.MSG_CTRUNC:
            raise LoaderError(
                f"data: this process has no file descriptor left for what worker {self.number} of rank {self._rank} "
                "sends: raise the limit (ulimit -n), or lower data.workers or data.prefetch"
            )
        if not files:
            return Failed(**json.loads(message))
        try:
            return unpack(files[0], struct.unpack(f"={len(message) // 8}q", message))
        finally:
            os.close(files[0])

    def _receive(self) -> tuple[bytes, list[int], int]:
        has_ended = False
        try:
            while True:
                with suppress(BlockingIOError):
                    message, files, flags, _ = socket.recv_fds(self._socket, _ANSWER_BYTES, 1, socket.MSG_DONTWAIT)
                    break
                if has_ended:  # and what it sent before that is taken
                    raise self._lost()
                has_ended = self._process.sentinel in wait([self._socket, self._process.sentinel])
        except OSError as error:
            raise self._lost() from error
        if not message:
            raise self._lost()
        return message, files, flags

    def end(self) -> None:
        """At once, whatever it is doing: it has nothing to put in order. Safe to call twice."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(END_SECONDS)
        self._socket.close()

    def failure(self, failed: Failed, request: Request) -> DdpError:
        """What the rank raises for `failed`; an error that the data set raised on purpose stays what it is."""
        kind = getattr(errors, failed.kind, None)
        if isinstance(kind, type) and issubclass(kind, DdpError):
            return kind(failed.text)
        return LoaderError(
            f"data: worker {self.number} (pid {self.process_id}) of rank {self._rank} raised {failed.kind}: "
            f"{failed.text}; while it fetched the examples at {request.start} to {request.stop - 1} of epoch "
            f"{request.epoch}: its traceback is in the log; with data.workers = 0 the rank fetches them itself"
        )

    def _lost(self) -> LoaderError:
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            how = (
                "was killed by SIGKILL, as the kernel does where memory is short: lower data.workers, data.prefetch or "
                "batch.micro_batch_size, or give the job more memory"
            )
        elif code is not None and code < 0:
            how = (
                f"was ended by {signal.Signals(-code).name}: look at what the data set runs; its own output comes first"
            )
        else:
            how = f"ended with code {code}: a data set must not end its process"
        return LoaderError(
            f"data: worker {self.number} (pid {self.process_id}) of rank {self._rank} {how}; then go on with "
            "--resume auto"
        )


def seed_micro_batch(seed: int, epoch: int, position: int) -> None:
    """Seed this process's generators for the micro-batch that begins at `position` of `epoch`: whatever worker fetches it,
    and whatever it fetched before. The key keeps them apart from those of `seed_rank`."""
    sequence = np.random.SeedSequence((seed, epoch, position), spawn_key=(1,))
    for_torch, for_numpy, for_python = sequence.generate_state(3).tolist()
    torch.default_generator.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


def _serve(
    near: socket.socket,
    far: socket.socket,
    dataset: Dataset[Any],
    plan: BatchPlan,
    parent: int,
    cores: Collection[int] | None,
    sampler: Sampler,
) -> None:
    """A worker's whole life: requests in, batches out."""
    gc.freeze()  # what the rank had lying about is not to be taken down here: a process group would wait for its threads
    for number in LEFT_TO_THE_RANK:
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    far.close()
    torch.set_num_threads(1)
    if cores:  # the rank may be pinned to one that it needs for itself
        with suppress(OSError):  # a container may have lost some meanwhile
            os.sched_setaffinity(0, cores)
    fetch = fetcher(dataset)
    order = None if sampler.follows_losses else sampler.order(plan, 0)
    near.send(_READY)
    while True:
        message, files, _, _ = socket.recv_fds(near, _REQUEST.size, 1)
        if not message:
            return
        request = Request(*_REQUEST.unpack(message))
        if files:
            order = _told_order(files[0])
            continue
        if not sampler.follows_losses:
            order = sampler.order(plan, request.epoch)
        assert order is not None  # the rank has told it
        seed_micro_batch(plan.seed, request.epoch, request.start)
        _send(near, fetch, order[request.start : request.stop].tolist())


def _told_order(file: int) -> NDArray[np.int64]:
    try:
        return np.frombuffer(mmap.mmap(file, 0, prot=mmap.PROT_READ), np.int64)
    finally:
        os.close(file)


def _send(near: socket.socket, fetch: Callable[[Sequence[int]], Batch], indices: Sequence[int]) -> None:
    try:
        file, sizes = pack(fetch(indices))
    except Exception as error:  # told without a file: memory may be what is missing
        failed = Failed(type(error).__name__, str(error)[:_TEXT], traceback.format_exc()[-_TEXT:])
        near.send(json.dumps(asdict(failed)).encode())
        return
    socket.send_fds(near, [struct.pack(f"={len(sizes)}q", *sizes)], [file])
    os.close(file)


def _die_with(parent: int) -> None:
    """Be killed when the rank's main thread ends, which made this process; at once where it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_all(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.end()
