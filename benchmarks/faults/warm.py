"""Ranks forked from a process that has imported torch already: a second after they were asked for they train.

They are processes like any other, with the variables that torchrun would give them; what is missing is a launcher that
ends the survivors or says what went wrong, so a row that is about neither can start its ranks so. A program that
uses this must guard what it does with `if __name__ == "__main__"`: each rank imports it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NoReturn

from launch.submit import free_port

IMPORTED = ["ddp.__main__", "ddp.training.run", "ddp.telemetry.report", "torch._dynamo", "faults.warm"]
PR_SET_PDEATHSIG = 1
MIXED = 99  # the code where ranks end with different ones
LOOK_SECONDS = 0.02


class WarmRanks:
    """All ranks of a run; as much of Popen as a single process has."""

    def __init__(self, processes: Sequence[ForkServerProcess]) -> None:
        self._processes = processes
        self.pid = processes[0].pid or 0

    def poll(self) -> int | None:
        """The code that all of them ended with; None while one runs."""
        codes = {process.exitcode for process in self._processes}
        return None if None in codes else codes.pop() if len(codes) == 1 else MIXED

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the ranks", seconds)
            time.sleep(LOOK_SECONDS)
        return code

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            os.kill(process.pid or 0, number)


def start(
    ranks: int, worker: Sequence[str], folder: Path, environment: Mapping[str, str], outputs: Sequence[Path]
) -> WarmRanks:
    """Ranks that run `ddp` with the arguments `worker` in `folder`; `outputs` get what they write."""
    everyones = {
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
    }
    processes: list[ForkServerProcess] = []
    for rank in range(ranks):
        own = {**everyones, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_server().Process(target=_rank, args=(list(worker), folder, own, list(outputs))))
        processes[-1].start()
    return WarmRanks(processes)


@cache
def _server() -> ForkServerContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before it imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _rank(worker: Sequence[str], folder: Path, environment: Mapping[str, str], outputs: Sequence[Path]) -> NoReturn:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, output in enumerate(outputs, start=1):
        opened = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.path.insert(0, str(folder))
    from ddp.__main__ import main

    main(worker)
