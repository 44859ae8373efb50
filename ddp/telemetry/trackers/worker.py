"""A tracker's process: lines of JSON come in, one answer goes out for each. Started by `tracker` alone.

The first line opens (`{"tracker": ..., "run": ..., "settings": ..., "project": ..., "folder": ..., "again": true}`), a list
is a batch of records, true is the end, false the end of a run that was broken off. An answer is `{"error": null}`, or what went wrong, after which the process ends.
What a library prints goes nowhere; it yields the processor to whoever wants it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

NICENESS = 19
ORPHAN_SECONDS = 10.0  # that a process whose run is gone goes on for


class Backend(Protocol):
    """One tracker's library. Whatever it raises is the tracker's failure."""

    def write(self, lines: list[dict[str, Any]]) -> None: ...
    def close(self, *, finished: bool) -> None: ...


def open_backend(opening: Mapping[str, Any]) -> Backend:
    """The libraries are imported here, one a process."""
    match opening["tracker"]:
        case "tensorboard":
            from ddp.telemetry.trackers.tensorboard_backend import TensorBoard

            return TensorBoard(opening)
        case "mlflow":
            from ddp.telemetry.trackers.mlflow_backend import MLflow

            return MLflow(opening)
        case "wandb":
            from ddp.telemetry.trackers.wandb_backend import WandB

            return WandB(opening)
        case other:
            raise ValueError(f"no tracker {other}")


def serve(requests: BinaryIO, answers: BinaryIO) -> int:
    """Answer until the end, or an error; the exit code."""
    backend: Backend | None = None
    for request in map(json.loads, requests):
        try:
            if backend is None:
                backend = open_backend(request)
            elif isinstance(request, bool):
                backend.close(finished=request)
            else:
                backend.write(request)
        except BaseException as error:  # wandb has its own for what ends a program
            _answer(answers, f"{type(error).__name__}: {error}")
            return 1
        _answer(answers, None)
        if isinstance(request, bool):
            return 0
    return 1  # the run is gone


def _answer(answers: BinaryIO, error: str | None) -> None:
    answers.write(json.dumps({"error": error}).encode() + b"\n")
    answers.flush()


def _leave_with_the_run(parent: int) -> None:
    """A run that was killed cannot end this process, which may be waiting for a server."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def main() -> int:
    os.nice(NICENESS)
    os.umask(0o077)
    threading.Thread(target=_leave_with_the_run, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    code = serve(sys.stdin.buffer, answers)
    answers.close()
    os._exit(code)  # no library's hooks: what was to be written is


if __name__ == "__main__":
    sys.exit(main())
