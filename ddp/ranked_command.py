"""What every command that runs on ranks does first and last, however the ranks were started."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from ddp import topology
from ddp.ending import leave
from ddp.errors import StoppedError, UsageError
from ddp.job import RedactingFormatter
from ddp.outcome import STDERR_VARIABLE
from ddp.topology import SINGLE_PROCESS, Topology
from ddp.training.signals import STOP_SIGNALS

PRIVATE = 0o077  # what a run writes is its owner's alone, whatever the umask was


@contextlib.contextmanager
def ranked() -> Iterator[Topology]:
    """This process's place among the ranks; an error inside ends it with a message, an outcome and its exit code."""
    here = SINGLE_PROCESS
    try:
        os.umask(PRIVATE)
        stop_cleanly_outside_training()
        here = topology.from_environment(os.environ)
        _show_errors_to_the_user(here)
        _show_log_to_the_user(here)
        yield here
    except BaseException as error:
        leave(error, here)


def print_on_rank_0(text: str, here: Topology) -> None:
    if here.rank == 0:
        sys.stdout.write(text)


def topology_or_single() -> Topology:
    try:
        return topology.from_environment(os.environ)
    except UsageError:
        return SINGLE_PROCESS


def stop_cleanly_outside_training() -> None:
    """While the trainer has no handlers of its own, a signal to stop ends this rank with the code for it.

    At once, without unwinding: an exception in the middle of an import of numpy's or torch's can abort the process. Only
    MPI wants to be taken down in order.
    """

    def stop(signal_number: int, _: FrameType | None) -> NoReturn:
        error = StoppedError(f"stopped by {signal.Signals(signal_number).name} outside of training: run again")
        if "mpi4py.MPI" in sys.modules:
            raise error
        try:
            leave(error, topology_or_single())
        except SystemExit as left:
            os._exit(left.code if isinstance(left.code, int) else StoppedError.exit_code)
        except BaseException:  # whatever the signal came in the middle of
            os._exit(StoppedError.exit_code)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def _show_errors_to_the_user(here: Topology) -> None:
    """Write errors where `launch` said; on another node, or where that cannot be opened, leave them as they are."""
    path = os.environ.get(STDERR_VARIABLE)
    if path and here.one_node:
        with contextlib.suppress(OSError):
            user = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(user, sys.stderr.fileno())
            os.close(user)


def _show_log_to_the_user(here: Topology) -> None:
    """Rank 0 says on standard error what it chose for the run; the others speak up only where something is wrong."""
    log = logging.getLogger("ddp")
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO if here.rank == 0 else logging.WARNING)
