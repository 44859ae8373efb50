"""The errors that this project raises on purpose, and the exit code each one leaves with.

    DdpError                      1  anything else that has a clear message
    ├── UsageError                2  bad command line, environment, job file or request
    │   ├── JobFileError          2  the job file, with the field path of each fault
    │   └── TopologyError         2  rank and world-size variables that contradict each other
    ├── DivergedError             3  a gradient or a loss is not finite
    ├── StoppedError             75  a signal asked for it and a checkpoint is saved: run again
    ├── TransportError            1  the gradient exchange failed
    │   └── PeerLostError         1  another rank died, left or did not come in time
    ├── LoaderError               1  a worker process that fetches data died or could not fetch
    ├── CheckpointError           1  a checkpoint cannot be read or written
    ├── ReplicaError              1  the ranks' parameters are no longer the same
    └── ChecksFailedError         1  `ddp check` found what is wrong with a job

A message says what was wrong, where (field path, rank, step, bucket) and what to do.
Whoever catches a `DdpError` at the edge prints the message without a traceback; any other
exception is a defect of the program (or of the user's task) and keeps its traceback.
"""

from __future__ import annotations


class DdpError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process leaves with."""

    exit_code = 1
    consequence = False  # true where another rank's error is the cause, and the one to show


class UsageError(DdpError):
    """The user asked for something that cannot be done."""

    exit_code = 2


class JobFileError(UsageError):
    """The job file, or a `--set` on top of it, is not a valid job."""


class TopologyError(UsageError):
    """The launcher's environment variables are partial or contradict each other."""


class DivergedError(DdpError):
    """A gradient or a loss is not finite: every rank raises this in the same step."""

    exit_code = 3


class StoppedError(DdpError):
    """Training stopped on a signal after saving a checkpoint; running again goes on."""

    exit_code = 75


class TransportError(DdpError):
    """The gradient exchange cannot be set up or failed."""


class PeerLostError(TransportError):
    """Another rank died, left, or did not reach the exchange before the deadline.

    Where that rank has an error of its own, that is the one to show.

    Attributes:
        lost_rank: that rank, where it is known.
    """

    consequence = True

    def __init__(self, message: str = "", lost_rank: int | None = None) -> None:
        super().__init__(message)
        self.lost_rank = lost_rank


class LoaderError(DdpError):
    """A process that fetches data for this rank died, or its data set raised."""


class CheckpointError(DdpError):
    """A checkpoint cannot be written, read or verified."""


class ReplicaError(DdpError):
    """The ranks' parameters are no longer the same: every rank raises this in the same step."""

    rank = -1  # whose are wrong; -1 where that cannot be told


class ChecksFailedError(DdpError):
    """`ddp check` found something wrong, and has printed what: every rank raises this at the end."""
