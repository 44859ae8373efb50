"""Runs a launcher's command and answers for everything that it starts.

The command gets a session of its own; signals are passed on as the launcher at hand understands them; the exit
code is the one that a rank wrote into the outcome file; and no process that was started here outlives this one:
orphans fall to us (PR_SET_CHILD_SUBREAPER) and are ended, and the kernel tells the launcher when we die.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO

from ddp import outcome
from ddp.errors import DivergedError, StoppedError, UsageError
from ddp.outcome import Outcome
from launch.deaths import DeathWatch
from launch.folder import private_folder

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
RUN_CODES = frozenset(kind.exit_code for kind in (UsageError, DivergedError, StoppedError))
RESTARTS_VARIABLE = "DDP_RESTART_COUNT"  # tells the ranks that they are started again
STOP_SECONDS = 40.0  # after a signal to stop; torchrun itself gives the ranks 30
PORTS = range(20_000, 32_000)  # below those that systems give to connections by themselves
PORT_TRIES = 50
END_SECONDS = 3.0  # between SIGTERM and SIGKILL for what a launcher left behind


def submit(
    argv: Sequence[str],
    environment: Mapping[str, str],
    signals: Mapping[int, int],
    stop_seconds: float = STOP_SECONDS,
    max_restarts: int = 0,
    run_directory: Path | None = None,
) -> int:
    """Run `argv` to its end and return the exit code of the run; its cause, if any, goes to stderr last.

    Args:
        argv: the launcher's command.
        environment: variables to set on top of this process's.
        signals: what is passed on to the launcher for each signal that this process gets.
        stop_seconds: how long everything may go on after SIGTERM or SIGINT; a second SIGINT ends it at once.
        max_restarts: how often the command is run again after a failure that may not come again: not a usage error, a
            divergence or a stop.
        run_directory: where the ranks leave how the run ended; the last attempt's end is put there if they could not.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    earlier = _earlier_restarts(os.environ)
    before = None if run_directory is None else outcome.read(run_directory / outcome.FILE_NAME)
    for attempt in range(max_restarts + 1):
        counted = {RESTARTS_VARIABLE: str(earlier + attempt)} if earlier + attempt else {}
        seen: list[int] = []
        code, ended = _attempt(argv, {**os.environ, **environment, **counted}, signals, stop_seconds, seen)
        if code == 0 or code in RUN_CODES or seen or attempt == max_restarts:
            if run_directory is not None and ended is not None and ended.code == code:
                outcome.correct(run_directory, before, ended)
            return code
        print(f"starting the ranks again ({attempt + 1} of {max_restarts})", file=sys.stderr)
    raise AssertionError("the last attempt returns")


def _earlier_restarts(environ: Mapping[str, str]) -> int:
    said = environ.get(RESTARTS_VARIABLE, "0")
    if not re.fullmatch(r"[0-9]{1,9}", said):
        raise UsageError(f"{RESTARTS_VARIABLE}={said} is not a number of 0 or more: unset it")
    return int(said)


def _attempt(
    argv: Sequence[str],
    variables: dict[str, str],
    signals: Mapping[int, int],
    stop_seconds: float,
    seen: list[int],
) -> tuple[int, Outcome | None]:
    """One run of the command: its code and what a rank wrote. The signals that came meanwhile are put into `seen`."""
    with private_folder() as folder:
        file = folder / outcome.FILE_NAME
        noise = folder / "launcher.log"
        variables[outcome.OUTCOME_FILE_VARIABLE] = str(file)
        with noise.open("w+b") as log, DeathWatch(file) as deaths:
            stderr = _users_stderr()
            if stderr is not None:
                variables[outcome.STDERR_VARIABLE] = stderr
            code = _run(argv, variables, signals, stop_seconds, log if stderr is not None else None, seen)
        said = noise.read_text(errors="replace")
        ended = outcome.read(file)
        is_answer = ended is not None and not (ended.code == StoppedError.exit_code and not seen)
        account = None if is_answer or code == 0 or seen else deaths.account(said, code)
        if account is not None:
            print(f"error: {account}", file=sys.stderr)
            return 1, None
        if ended is None or (ended.code == 0 and code != 0):
            sys.stderr.write(said)  # for want of a better account
            sys.stderr.flush()
        shown = ended
        if ended is not None and ended.lost_rank is not None:
            by = deaths.signal_of(ended.lost_rank, said, code)
            shown = replace(ended, cause=f"{ended.cause}, by {by}") if by else ended
        return conclude(shown, code, argv[0]), ended


def conclude(ended: Outcome | None, code: int, program: str) -> int:
    """The run's exit code from what a rank wrote and from the launcher's own code; prints the cause."""
    if ended is not None and ended.code != 0:
        print(ended.message(), file=sys.stderr)
        return ended.code
    if code == 0 or ended is not None:  # done, whatever a signal did to the launcher after that
        return 0
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
    print(f"error: {program} ended with {by}, and no rank said why", file=sys.stderr)
    return code if code in RUN_CODES else 1  # MPICH's leaves with 9 when a rank got signal 9


def free_port() -> int:
    """A TCP port that is free at this moment, and that the system gives to no connection before its user has it."""
    for _ in range(PORT_TRIES):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("", port))  # on all addresses: torch's store does the same
            return port
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def core_count() -> int:
    """Physical cores that this process may use: what Open MPI counts as slots."""
    siblings: set[str] = set()
    for cpu in os.sched_getaffinity(0):
        with contextlib.suppress(OSError):
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
    return len(siblings) or len(os.sched_getaffinity(0))


def _run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    signals: Mapping[int, int],
    stop_seconds: float,
    log: IO[bytes] | None,
    seen: list[int],
) -> int:
    inherited = frozenset(
        descendants(os.getpid())
    )  # a shell's `> >(tee log)` comes with an exec; it is not ours to end
    with _signals_passed_on(signals, stop_seconds, inherited, seen) as watch:
        try:
            child = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  there is one thread here
            )
            watch(child)
            return child.wait()
        finally:
            _end_descendants(inherited)


@contextlib.contextmanager
def _signals_passed_on(
    signals: Mapping[int, int], stop_seconds: float, inherited: frozenset[int], seen: list[int]
) -> Generator[Callable[[subprocess.Popen[bytes]], None]]:
    """Handlers that pass signals on to the child once it is known, note them in `seen`, and see that it ends."""
    child: subprocess.Popen[bytes] | None = None

    def watch(started: subprocess.Popen[bytes]) -> None:
        nonlocal child
        child = started
        for number in seen:
            child.send_signal(signals[number])

    def handle(number: int, _: FrameType | None) -> None:
        is_impatient = number == signal.SIGINT and number in seen
        seen.append(number)
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.alarm(max(1, round(stop_seconds)))
        if is_impatient:
            _signal_descendants(signal.SIGKILL, inherited)
        elif child is not None:
            child.send_signal(signals[number])

    def give_up(_number: int, _: FrameType | None) -> None:
        _signal_descendants(signal.SIGKILL, inherited)

    # nohup ignores SIGHUP for us, and we for the launcher
    heeded = [each for each in signals if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, give_up)
    try:
        yield watch
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_descendants(inherited: frozenset[int]) -> None:
    """End every process below this one but the inherited: ask, wait, kill; then collect them."""
    _signal_descendants(signal.SIGTERM, inherited)
    deadline = time.monotonic() + END_SECONDS
    while not inherited.issuperset(descendants(os.getpid())):
        if time.monotonic() > deadline:
            _signal_descendants(signal.SIGKILL, inherited)
        _collect_ended()
        time.sleep(0.02)


def _signal_descendants(number: int, inherited: frozenset[int]) -> None:
    for process in set(descendants(os.getpid())) - inherited:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _collect_ended() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(root: int) -> list[int]:
    """Ids of all processes below `root`, by /proc; orphans are below a process that adopts them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(children.get(root, ()))
    for process in found:
        found += children.get(process, ())
    return found


def _users_stderr() -> str | None:
    """A path under which the ranks can open this process's stderr; None where that would not be the same.

    A socket cannot be opened again; a file can, but the position in it would be another one, and the ranks and
    the shell would write over each other. So all append: we share what is open, and its flags, with the shell.
    """
    number = sys.stderr.fileno()
    if stat.S_ISREG(os.fstat(number).st_mode):
        fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_APPEND)
    path = f"/proc/{os.getpid()}/fd/{number}"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    except OSError:
        return None
    return path


def _die_with(parent: int) -> Callable[[], None]:
    """Run in the child before exec: SIGTERM when the parent dies, however that happens."""

    def prepare() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # not Linux: what is orphaned stays so
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
