"""Stopping on a signal: a handler only sets a flag, which travels in the step's row until all ranks agree."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A closed terminal is a reason to stop, unless the program was started so as to outlive it (nohup).
_HANGUP = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else ()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, *_HANGUP)


class StopRequest:
    """Whether a signal asked this rank to stop, and which."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def asked(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the STOP_SIGNALS into a request; the old handlers come back afterwards.

    torchrun forwards the first two; Open MPI the last two, and gives a rank a quarter of a second after SIGTERM.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
