"""Run a function on several real ranks, quickly and with a deadline. For tests only.

    def average(rank: int, world_size: int, store_address: str, size: int) -> list[float]:
        with process_group(rank, world_size, store_address):     # gloo on 127.0.0.1; leave out if not needed
            tensor = torch.full((size,), float(rank))
            torch.distributed.all_reduce(tensor)
            return (tensor / world_size).tolist()

    def test_average(rank_pool: RankPool) -> None:
        results = rank_pool.run(2, average, 3)                   # one result a rank, in rank order
        assert results == [[0.5] * 3] * 2

`rank_pool` (a fixture of conftest.py) keeps its processes for the whole session: importing torch takes
2 seconds, a call about 2 milliseconds. Use `run_ranks` instead, of the same signature, where a test kills its
ranks, changes their environment or leaves state behind. The function must live at the top of a test module;
arguments and results are pickled. Each process has one thread (OMP_NUM_THREADS=1), warnings as errors, and
its own `store_address` of a TCPStore a call (see `connect_store`).

A rank that raises, dies or misses the deadline raises `RankFailure` here with the traceback of every
rank concerned; a process that took part is then ended and replaced. A test of an expected error catches it
inside the function and returns it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

GRACE_SECONDS = 5.0  # for the other ranks to say what they saw, once one has failed
PR_SET_PDEATHSIG = 1


class RankFailure(AssertionError):
    """Some ranks did not return; `causes` has a traceback or a sentence for each of them."""

    def __init__(self, world_size: int, causes: Mapping[int, str]) -> None:
        self.causes = dict(causes)
        super().__init__("\n".join(f"rank {rank} of {world_size}: {causes[rank]}" for rank in sorted(causes)))


class RankPool:
    """Processes that wait for functions to run; a call on n ranks uses the first n. Use as a context manager."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(len(self._workers))

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Call `function(rank, world_size, store_address, *args)` on each rank and return the results in rank order."""
        while len(self._workers) < world_size:
            self._workers.append(_Worker(self._environment))
        workers = self._workers[:world_size]
        store = _serve_store()
        try:
            for rank, worker in enumerate(workers):
                worker.submit(function, (rank, world_size, f"127.0.0.1:{store.port}", *args))
            results, causes = _collect(workers, timeout)
        except BaseException:
            self._end(world_size)
            raise
        if causes:
            self._end(world_size)
            raise RankFailure(world_size, causes)
        return [results[rank] for rank in range(world_size)]

    def _end(self, count: int) -> None:
        ended, self._workers = self._workers[:count], self._workers[count:]
        for worker in ended:
            worker.ask_to_end()
        for worker in ended:
            worker.end()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """`RankPool.run` on processes of its own, with `environment` on top of this process's."""
    with RankPool(environment) as pool:
        return pool.run(world_size, function, *args, timeout=timeout)


def connect_store(store_address: str, timeout: float = 30.0) -> dist.TCPStore:
    """A client of the store that was made for this call."""
    host, _, port = store_address.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout))


def _serve_store() -> dist.TCPStore:
    """A store that listens on IPv4 alone: of an IPv4 client of a dual-stack one torch asks the DNS for the name."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@contextlib.contextmanager
def process_group(
    rank: int, world_size: int, store_address: str, backend: str = "gloo", timeout: float = 30.0
) -> Iterator[None]:
    """torch's default process group over this call's ranks, destroyed on the way out."""
    store = connect_store(store_address, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    try:
        _meet(store, world_size)  # a rank that left at once would look like a crash to one that is still connecting
        yield
    finally:
        # Gloo's threads take the GIL to let go of a collective that ran inside backward. The end of a model joins
        # them with the GIL held, and hangs where they have not been served yet (torch 2.13).
        time.sleep(0.05)
        dist.destroy_process_group()


def _meet(store: dist.TCPStore, world_size: int) -> None:
    arrived = store.add("arrived", 1)
    meeting = f"meeting {(arrived - 1) // world_size}"
    if arrived % world_size == 0:
        store.set(meeting, "complete")
    store.wait([meeting])


class _Worker:
    """One child process, from the parent's side."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.connection, child = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
        with child:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(child.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[child.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
            )

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        task = pickle.dumps((function, args))
        with contextlib.suppress(BrokenPipeError):  # it died: `_collect` will find the end of the file
            self.connection.send_bytes(task)

    def answer(self) -> tuple[bool, Any]:
        """Whether the function returned, and its result or the traceback. Blocks until there is one."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = self._process.wait(GRACE_SECONDS)
            return False, f"the process ended with code {code}\n{self._stderr_text()}"

    def stacks(self) -> str:
        """Where each thread of the process is, written by faulthandler in the process itself."""
        known = self._stderr_bytes()
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + GRACE_SECONDS
        while self._stderr_bytes() == known and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # it writes line by line
        return self._stderr_text()

    def ask_to_end(self) -> None:
        self.connection.close()

    def end(self) -> None:
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _stderr_bytes(self) -> int:
        return os.fstat(self._stderr.fileno()).st_size

    def _stderr_text(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")[-8000:]


def _collect(workers: list[_Worker], timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and failures by rank. After a first failure the others have `GRACE_SECONDS` left."""
    waiting: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(workers)}
    results: dict[int, Any] = {}
    causes: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            rank = waiting.pop(connection)
            returned, value = workers[rank].answer()
            if returned:
                results[rank] = value
                continue
            causes[rank] = value
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    late = "was still running when another rank failed" if causes else f"did not return within {timeout:g} s"
    return results, causes | {rank: f"{late}\n{workers[rank].stacks()}" for rank in waiting.values()}


def _serve(file_descriptor: int) -> None:
    """The child's whole life: functions in, results out, until the parent closes the connection."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable()
    torch.set_num_threads(1)
    with Connection(file_descriptor) as connection:
        while True:
            try:
                task = connection.recv_bytes()
            except EOFError:
                return
            faulthandler.unregister(signal.SIGUSR1)  # a task before may have had a handler of its own, and faulthandler
            faulthandler.register(signal.SIGUSR1, all_threads=True)  # registers nothing twice
            connection.send_bytes(_answer(task))


def _answer(task: bytes) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function, args = pickle.loads(task)
            return pickle.dumps((True, function(*args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
