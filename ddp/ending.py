"""How a rank ends: the one place where an error becomes a message, an outcome and an exit code.

Ranks fail together, so a cause is to be shown once: by `launch` where that started the ranks (it reads the outcome
file), else by one rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ddp import outcome
from ddp.board import FAILED, say_ended
from ddp.errors import DdpError, DivergedError, StoppedError, UsageError
from ddp.job import redact
from ddp.outcome import OUTCOME_FILE_VARIABLE, Outcome
from ddp.topology import Topology
from ddp.training.attempt import note_refused
from ddp.training.signals import STOP_SIGNALS

GRACE_SECONDS = 2.0  # for a rank with a better claim to be heard first
MEET_SECONDS = 5.0  # for all ranks to leave together
EXIT_SECONDS = 20  # for the interpreter to shut down, MPI_Finalize included


def leave(error: BaseException, here: Topology) -> NoReturn:
    """Record why this rank ends, show it where nobody else does, and end so that the other ranks end too."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    mine = outcome.failure(error, here.rank, here.world_size, consequence=_is_consequence(error))
    mine = replace(mine, cause=redact(mine.cause))
    file = outcome.record(mine, getattr(error, "run_directory", None))
    say_ended(here.rank, FAILED)
    if mine.code == UsageError.exit_code:
        note_refused(os.environ)
    if _is_heard(error, mine, file):
        _show(error, mine)
    signal.alarm(EXIT_SECONDS)  # an MPI_Finalize or a thread may wait for ranks that are gone
    _end(mine.code, here)


def _is_consequence(error: BaseException) -> bool:
    """Whether c10d's control plane lost a peer. Imports nothing: a signal may have come in the middle of that."""
    is_peer_gone = getattr(sys.modules.get("ddp.process_group"), "is_peer_gone", None)
    return is_peer_gone is not None and is_peer_gone(error)


def _is_heard(error: BaseException, mine: Outcome, file: Path | None) -> bool:
    """Whether this rank's cause is the one to show. Ranks that yield stay a moment: their end would end the others."""

    def speak_if_chosen(*_: object) -> NoReturn:
        """A rank has ended: that was lost, and this one is to say so, or it was heard before."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if file is not None and outcome.read(file) == mine:
            _show(error, mine)
        os._exit(mine.code)

    signal.signal(signal.SIGTERM, speak_if_chosen)
    if mine.consequence and mine.code == UsageError.exit_code:  # shared by all, and said by the rank that found it
        return False
    if file is None:  # too early for a file: rank 0 speaks, others if its end has not ended them meanwhile
        time.sleep(GRACE_SECONDS * (mine.rank != 0) + GRACE_SECONDS * mine.consequence)
        return True
    deadline = time.monotonic() + GRACE_SECONDS
    while mine.consequence and outcome.read(file) == mine and time.monotonic() < deadline:
        time.sleep(0.02)
    held = outcome.read(file)
    if held is None or held == mine:
        return True
    time.sleep(GRACE_SECONDS / 2)
    return False


def _show(error: BaseException, mine: Outcome) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said once, and to the end
    expected = isinstance(error, DdpError) or mine.consequence
    if not expected:
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    is_said = not expected and mine.line() == mine.cause
    if OUTCOME_FILE_VARIABLE not in os.environ and not is_said:
        sys.stderr.write(f"{mine.message()}\n")
    sys.stderr.flush()


def _end(code: int, here: Topology) -> NoReturn:
    """Leave with `code`. Where all ranks leave by agreement they leave together, else MPI's others are ended."""
    agreed = code in (UsageError.exit_code, DivergedError.exit_code, StoppedError.exit_code)
    launched = os.environ.get(OUTCOME_FILE_VARIABLE)
    if launched and agreed and outcome.meet(Path(launched), here.rank, here.world_size, MEET_SECONDS):
        _exit(0)  # `launch` knows the code; torchrun and mpirun would only make noise about it
    if "mpi4py.MPI" in sys.modules:
        from ddp import process_group

        if not (agreed and process_group.meet(MEET_SECONDS)):
            process_group.abort(code)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Where a process group stands the interpreter is not taken down with it: gloo's thread may still be letting go of
    a collective over a Python tensor, which aborts the process then (torch 2.13)."""
    is_initialized = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)
    if is_initialized is None or not is_initialized():
        sys.exit(code)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
