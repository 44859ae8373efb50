"""How a trial's processes are started, asked to stop, killed and waited for: as forks of a server, or as a command.

Both run `python -m ddp train`; a command of several ranks goes through torchrun. Whoever started a process is its
parent, so that no signal can meet another process that has got its number.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol, Self

from ddp.errors import DdpError, StoppedError
from ddp.job import Job
from ddp.outcome import OUTCOME_FILE_VARIABLE, STDERR_VARIABLE
from ddp.search.workers import PR_SET_PDEATHSIG, READY_SECONDS, Unusable, describe_end, environment_of_one_thread
from ddp.sweep.fork_server import Ended, Ready, Signal, Start, serve
from ddp.sweep.processes import descendants, kill_all, marked, peak_rss_bytes
from ddp.telemetry.station import NO_REPORT_VARIABLE
from ddp.topology import FAMILIES, RESTARTED_FROM_OUTSIDE
from ddp.training.signals import StopRequest

LOOK_SECONDS = 0.1
VISIBLE = "CUDA_VISIBLE_DEVICES"
MARK = "DDP_SWEEP_TRIAL"  # in the environment of a command: which trial it is


class Running(Protocol):
    """A trial's processes."""

    peak_memory_bytes: int  # of the largest, so far

    def exit_code(self) -> int | None:
        """Negative: a signal; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask all its ranks to save and stop, which they agree on."""
        ...

    def kill(self) -> None:
        """End everything of it at once."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A trial to be started.

    Attributes:
        name: with its stage's, unique in the sweep.
        arguments: after `python -m ddp`.
        outcome: the file in which its ranks say how they ended.
        devices: GPUs that it may see, counted among those that this process sees; None: all of them.
    """

    name: str
    arguments: tuple[str, ...]
    outcome: Path
    log: Path
    devices: tuple[int, ...] | None = None

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` without what a launcher or a scheduler says of this process: a trial's ranks are a world of their own."""
        told = {name for family in FAMILIES for name in (*family.traces, *family.also_needed, family.restarts)}
        told |= {*RESTARTED_FROM_OUTSIDE, STDERR_VARIABLE, "DDP_RUN_ID", "TORCHELASTIC_ERROR_FILE"}
        own = {OUTCOME_FILE_VARIABLE: str(self.outcome), NO_REPORT_VARIABLE: "1"}
        if self.devices is not None:
            visible = (
                environ[VISIBLE].split(",") if VISIBLE in environ else None
            )  # numbers or names, as a scheduler gave them
            own[VISIBLE] = ",".join(str(each) if visible is None else visible[each] for each in self.devices)
        return {name: value for name, value in environ.items() if name not in told} | own


class ForkServer:
    """The master's end of `fork_server`; a context manager, after which nothing of it runs."""

    def __init__(self, job: Job, ranks: int, allow_import: Sequence[str], stop: StopRequest) -> None:
        """
        Raises:
            DdpError: the job cannot run, as the error that it was there.
            StoppedError: a signal came while the task was loaded.
        """
        self._stop = stop
        self._arguments = (job, ranks, tuple(allow_import))
        self._forks: dict[str, _Fork] = {}
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self.ready = self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server, and by that its forks. Safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def start(self, request: Request) -> Running:
        """A fork for `request`; a server that died is replaced."""
        if self._process is None:
            self._begin()
        fork = _Fork(request.name, self._send)
        self._forks[request.name] = fork
        environment = request.environment(os.environ)
        self._send(Start(request.name, request.arguments, environment, request.log))
        return fork

    def wait(self, seconds: float) -> None:
        """Until something is heard, at most so long."""
        if self._pipe is None:
            time.sleep(seconds)
            return
        try:
            while connection.wait([self._pipe], seconds):
                ended: Ended = self._pipe.recv()
                fork = self._forks.pop(ended.name)
                fork.code, fork.peak_memory_bytes = ended.code, ended.peak_memory_bytes
                seconds = 0.0
        except (EOFError, OSError):
            self._lost()

    def _begin(self) -> Ready:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *self._arguments), name="fork-server")
        with environment_of_one_thread():
            self._process.start()
        theirs.close()
        return self._first_word()

    def _first_word(self) -> Ready:
        assert self._pipe is not None and self._process is not None
        try:
            until = time.monotonic() + READY_SECONDS
            while not self._pipe.poll(LOOK_SECONDS):
                if self._stop.asked:
                    raise StoppedError(f"stopped by {self._stop.signal_name} while the task was loaded: run again")
                if time.monotonic() > until:
                    raise DdpError(f"the task was not loaded within {READY_SECONDS:g} s")
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            end = describe_end(self._process.exitcode)
            self.close()
            raise DdpError(f"the process that loads the task {end}; its error is above") from None
        except BaseException:
            self.close()
            raise
        if isinstance(answer, Unusable):
            self.close()
            raise answer.error()
        return answer

    def _send(self, message: Start | Signal) -> None:
        try:
            if self._pipe is not None:
                self._pipe.send(message)
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """Its forks went with it."""
        self.close()
        for fork in self._forks.values():
            fork.code = -signal.SIGKILL
        self._forks.clear()


@dataclass(slots=True)
class _Fork:
    name: str
    send: Callable[[Signal], None]
    code: int | None = None
    peak_memory_bytes: int = 0

    def exit_code(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.send(Signal(self.name, signal.SIGTERM))

    def kill(self) -> None:
        self.send(Signal(self.name, signal.SIGKILL))


def start_command(request: Request, ranks: int) -> Running:
    """`request` as a process of its own in a session of its own: torchrun's where it has several ranks.

    What an earlier attempt at the trial left running is killed.
    """
    mark = f"{MARK}={request.outcome}"
    kill_all(marked(mark))
    environment = {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}
    environment |= request.environment(os.environ) | dict([mark.split("=", 1)])
    worker = [sys.executable, "-m", "ddp", *request.arguments]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    descriptor = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            worker if ranks == 1 else agent + worker,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            preexec_fn=_stopped_with(os.getpid()),  # noqa: PLW1509  there is one thread here
        )
    finally:
        os.close(descriptor)
    return _Command(process, mark, ranks)


@dataclass(slots=True)
class _Command:
    process: subprocess.Popen[bytes]
    mark: str
    ranks: int
    peak_memory_bytes: int = 0
    _below: list[int] = field(default_factory=list)

    def exit_code(self) -> int | None:
        code = self.process.poll()
        if code is None:
            self._look()
        else:
            kill_all(marked(self.mark))  # ranks have sessions of their own
        return code

    def stop(self) -> None:
        """torchrun passes SIGTERM on to its ranks, and waits for them."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        below = descendants(self.process.pid)
        self.process.kill()
        kill_all([*below, *marked(self.mark)])

    def _look(self) -> None:
        """Peak memory of the trial's own processes: not of torchrun's agent."""
        ranks = descendants(self.process.pid)
        watched = ranks if self.ranks > 1 else [self.process.pid, *ranks]
        self.peak_memory_bytes = max([self.peak_memory_bytes, *map(peak_rss_bytes, watched)])


def _stopped_with(master: int) -> Callable[[], None]:
    """Have the kernel ask the command to stop when its master ends: it saves, and the next master goes on."""
    prctl = ctypes.CDLL(None).prctl

    def set_up() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != master:
            os._exit(1)

    return set_up


def kill_quietly(running: Running) -> None:
    with contextlib.suppress(OSError):
        running.kill()
