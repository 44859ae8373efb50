"""A process that has loaded torch and the task once, and of which trials are forks: their start costs a tenth.

A fork runs the very `python -m ddp train` of a command line, in a session of its own, with a log of its own. The server
starts them, passes signals on, and says how each ended; it and its forks end with their master, however that ends.
It is also who finds out whether the job can run at all, and how many examples there are.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from ddp.job import Job, hide_secrets_in_hooks, redact
from ddp.search.workers import Unusable, end_with_parent, leave_signals_to_the_parent, loaded_or_why_not

DEFAULT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Ready:
    """The server's first word: what the job turned out to be."""

    training_examples: int
    goal: str
    device: str
    devices: int  # GPUs; 0 on a CPU


@dataclass(frozen=True, slots=True)
class Start:
    """A fork is wanted: `argv` after `python -m ddp`, in exactly this environment, with its output in `log`."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


@dataclass(frozen=True, slots=True)
class Signal:
    """For a fork that has not ended; SIGKILL goes to all of its session's group."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A fork has: its exit code (negative: a signal), and the peak RSS of it."""

    name: str
    code: int
    peak_memory_bytes: int


def serve(pipe: Connection, job: Job, ranks: int, allow_import: Sequence[str]) -> None:
    """The server's life: look at the job, say so, and fork until the pipe closes."""
    end_with_parent(os.getppid())
    leave_signals_to_the_parent()
    hide_secrets_in_hooks()
    found = loaded_or_why_not(lambda: look_at(job, ranks, allow_import))
    pipe.send(found)
    if isinstance(found, Unusable):
        return
    gc.collect()
    gc.freeze()  # so that the forks' collectors leave the pages shared
    forks: dict[str, int] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            watched = {os.pidfd_open(pid): name for name, pid in forks.items()}
            try:
                ready = connection.wait([pipe, *watched])
            finally:
                for descriptor in watched:
                    os.close(descriptor)
            for descriptor in ready:
                if isinstance(descriptor, int):
                    name = watched[descriptor]
                    pipe.send(_reaped(name, forks.pop(name)))
            if pipe in ready:
                _do(pipe.recv(), forks, pipe)


def look_at(job: Job, ranks: int, allow_import: Sequence[str]) -> Ready:
    """Load the task and its data once, and step its optimizer: what is imported now is not by each fork.

    Raises:
        UsageError: the job cannot run.
    """
    import torch

    from ddp.search.workload import rehearse
    from ddp.topology import SINGLE_PROCESS
    from ddp.training import run  # noqa: F401  # once here
    from ddp.training.plan import plan_run, size_of
    from ddp.training.resources import choose_device

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    device = choose_device(job.run.device, SINGLE_PROCESS)
    plan = plan_run(job, ranks, 0, allow_import=allow_import)
    size_of(plan.splits.validation)
    if device.type == "cpu":
        rehearse(plan.module, job.optimizer)
    devices = torch.cuda.device_count() if device.type == "cuda" else 0
    return Ready(plan.batches.examples, plan.goal, device.type, devices)


def _do(wanted: Start | Signal, forks: dict[str, int], pipe: Connection) -> None:
    if isinstance(wanted, Start):
        try:
            forks[wanted.name] = _forked(wanted, pipe)
        except OSError as error:
            with contextlib.suppress(OSError):
                wanted.log.write_text(f"no process: {error.strerror}\n", encoding="utf-8")
            pipe.send(Ended(wanted.name, 1, 0))
    elif (pid := forks.get(wanted.name)) is not None:
        send = os.killpg if wanted.number == signal.SIGKILL else os.kill
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, wanted.number)


def _reaped(name: str, pid: int) -> Ended:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left behind; the group is its own while it is not reaped
    _, status, used = os.wait4(pid, 0)
    return Ended(name, os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024)


def _forked(wanted: Start, pipe: Connection) -> int:
    """The fork's pid, whose session is its own by then."""
    server = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which a server has none of
        pid = os.fork()
    if pid == 0:
        try:
            pipe.close()
            os.setsid()
            end_with_parent(server)
            _train(wanted)
        finally:
            os._exit(1)
    _wait_for_session(pid)
    return pid


def _wait_for_session(pid: int) -> None:
    """A signal to its group must not meet ours."""
    with contextlib.suppress(ProcessLookupError):
        while os.getpgid(pid) != pid:
            time.sleep(0.0005)


def _train(wanted: Start) -> NoReturn:
    for number in DEFAULT_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(wanted.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    for descriptor, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(wanted.environment)
    sys.argv = ["ddp", *wanted.argv]
    code: object = 1
    try:
        importlib.import_module("ddp.__main__").main(wanted.argv)  # above this module, but what a fork is
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
