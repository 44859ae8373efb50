"""Processes that run trials side by side: one thread each, and a fresh fork for every trial.

A worker loads the task and its data once. Each trial then runs in a child of its own, so that its memory is its own
peak, and what kills it (memory, most likely) is a failed trial and not the end of the search. On a GPU, which does
not survive a fork, the worker runs it itself and is replaced when it dies. Workers and their children end with their
parent, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ddp import errors
from ddp.errors import DdpError
from ddp.job import hide_secrets_in_hooks, redact
from ddp.search.request import Trial
from ddp.search.store import TrialResult
from ddp.search.sweep_file import Sweep

if TYPE_CHECKING:
    from ddp.search.workload import Workload

T = TypeVar("T")

READY_SECONDS = 300.0  # for a worker to import torch and load the data
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker's first word."""

    training_examples: int
    device: str


@dataclass(frozen=True, slots=True)
class Unusable:
    """Its first word where the job cannot be run at all."""

    kind: str
    message: str

    def error(self) -> DdpError:
        """The one that it was where it was raised."""
        return getattr(errors, self.kind, DdpError)(self.message)


@dataclass(frozen=True, slots=True)
class Failed:
    """What became of a trial that has no result."""

    cause: str


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    limit: Any  # shared with it: steps after which its present trial is hopeless, as known by now
    trial: Trial | None = None


class Pool:
    """Workers for one search; a context manager, after which none of them is left."""

    def __init__(self, sweep: Sweep, workers: int | None, *, allow_import: Sequence[str]) -> None:
        """
        Args:
            workers: one for each core this process may use where None, one on a GPU.

        Raises:
            UsageError: the first worker finds that the job cannot be run.
        """
        self._sweep, self._allow_import = sweep, allow_import
        self._workers: list[_Worker] = []
        try:
            self.ready = _first_word(self._begin())
            cores = len(os.sched_getaffinity(0)) if self.ready.device == "cpu" else 1
            self._wanted = workers or cores
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._wanted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> list[Trial]:
        """Trials under way."""
        return [worker.trial for worker in self._workers if worker.trial is not None]

    @property
    def idle(self) -> int:
        """Trials that could begin now."""
        return self._wanted - len(self.running)

    def start(self, trial: Trial) -> None:
        """Begin `trial` on a worker that is idle; there must be one."""
        worker = next((worker for worker in self._workers if worker.trial is None), None)
        if worker is None:
            worker = self._begin()
        worker.trial, worker.limit.value = trial, trial.hopeless_steps
        with contextlib.suppress(OSError):  # it has just died: `finished` sees it
            worker.pipe.send(trial)

    def limit(self, hopeless_steps: Callable[[Trial], float]) -> None:
        """Tell trials under way what has become known since they began; it only ever falls."""
        for worker in self._workers:
            if worker.trial is not None:
                worker.limit.value = min(worker.limit.value, hopeless_steps(worker.trial))

    def finished(self, timeout_seconds: float) -> list[tuple[Trial, TrialResult | Failed]]:
        """Trials that ended meanwhile; returns as soon as there is one."""
        busy = {worker.pipe: worker for worker in self._workers if worker.trial is not None}
        results: list[tuple[Trial, TrialResult | Failed]] = []
        for pipe in connection.wait(list(busy), timeout_seconds):
            worker = busy[pipe]  # type: ignore[index]  # only pipes were waited for
            answer = self._receive(worker)
            if not isinstance(answer, Ready) and worker.trial is not None:
                results.append((worker.trial, answer))
                worker.trial = None
        return results

    def close(self) -> None:
        """End all workers, and with them the trials they run. Safe to call twice."""
        for worker in self._workers:
            worker.process.kill()  # its child is killed by the kernel, see `end_with_parent`
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _begin(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        limit = context.RawValue("d", math.inf)
        process = context.Process(target=serve, args=(theirs, limit, self._sweep, self._allow_import), name="trials")
        with environment_of_one_thread():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, limit))
        return self._workers[-1]

    def _receive(self, worker: _Worker) -> TrialResult | Failed | Ready:
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            worker.pipe.close()
            return Failed(f"the worker {describe_end(worker.process.exitcode)}")
        return Failed(answer.message) if isinstance(answer, Unusable) else answer


def serve(pipe: Connection, limit: Any, sweep: Sweep, allow_import: Sequence[str]) -> None:
    """A worker's life: load, say so, and run one trial after the other until the pipe closes."""
    end_with_parent(os.getppid())
    leave_signals_to_the_parent()
    hide_secrets_in_hooks()
    import torch

    from ddp.search import trial  # noqa: F401  # once here, and not in every child
    from ddp.search.workload import load_workload, make_model, rehearse

    torch.set_num_threads(1)

    def load() -> Workload:
        loaded = load_workload(sweep, allow_import=allow_import)
        rehearse(make_model(loaded, sweep.job.run.seed), sweep.job.optimizer)
        return loaded

    workload = loaded_or_why_not(load)
    if isinstance(workload, Unusable):
        pipe.send(workload)
        return
    pipe.send(Ready(workload.training_examples, workload.device.type))
    attempt = _attempt if workload.device.type != "cpu" else _attempt_in_a_child
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(attempt(workload, pipe.recv(), limit))


def loaded_or_why_not(load: Callable[[], T]) -> T | Unusable:
    """What `load` gives; an error that is none of ours is shown, and ends this process."""
    try:
        return load()
    except DdpError as error:
        return Unusable(type(error).__name__, redact(str(error)))
    except Exception as error:
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
        raise SystemExit(1) from None


def _attempt_in_a_child(workload: object, trial: Trial, limit: Any) -> TrialResult | Failed:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, os.getpid(), workload, trial, limit))
    process.start()
    theirs.close()
    with ours:
        try:
            answer: TrialResult | Failed = ours.recv()
        except EOFError:
            process.join()
            return Failed(describe_end(process.exitcode))
    process.join()
    return answer


def _child(pipe: Connection, parent: int, workload: object, trial: Trial, limit: Any) -> None:
    end_with_parent(parent)
    pipe.send(_attempt(workload, trial, limit))


def _attempt(workload: object, trial: Trial, limit: Any) -> TrialResult | Failed:
    """The trial's result, or the last words of whatever it raised: one bad trial does not end a search."""
    from ddp.search.trial import run_trial
    from ddp.search.workload import Workload

    assert isinstance(workload, Workload)
    try:
        return run_trial(workload, trial, lambda: limit.value)
    except DdpError as error:
        return Failed(redact(str(error)))
    except Exception as error:
        return Failed(redact(f"{type(error).__name__}: {error}"))


def describe_end(exit_code: int | None) -> str:
    """An exit code in words, for somebody who asks what happened."""
    if exit_code is None or exit_code >= 0:
        return f"ended with code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _first_word(worker: _Worker) -> Ready:
    try:
        if not worker.pipe.poll(READY_SECONDS):
            raise DdpError(f"the first worker did not load the task within {READY_SECONDS:g} s")
        answer = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        raise DdpError(
            f"the first worker {describe_end(worker.process.exitcode)} while it loaded the task; its error is above"
        ) from None
    if isinstance(answer, Unusable):
        raise answer.error()
    return answer


@contextlib.contextmanager
def environment_of_one_thread() -> Iterator[None]:
    """What a process that is started meanwhile inherits: libraries read it while they load."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def leave_signals_to_the_parent() -> None:
    """A terminal's Ctrl-C and a launcher's signal reach the whole group; the parent decides."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, and end now where that has happened already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
