"""One tracker as rank 0 sees it: a bounded queue, a thread, and the process that the thread hands batches to.

Handing in a record is an append. The thread sends a batch of lines as one line of JSON and waits for one in answer;
however long that takes, nobody else waits for it. An error, or the process's end, is said once; the batch is kept, and
a new process gets it, at first after two seconds, then ever later. What the queue has no room for is dropped, said once,
and counted. At the end of a run `finish` says that no more comes, and `leave_by` ends the process where it is not done.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddp.job import redact
from ddp.telemetry.trackers.lines import SURROGATES, Line, LoggedRecord, encoded, text

QUEUE_LENGTH = 2_000  # records
BATCH_LENGTH = 100  # records, in one request to a server
INTERVAL_SECONDS = 1.0  # longest time that a record waits for others to be sent with it
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 300.0  # before another try
LAST_TRIES = 2  # once no more comes: a process that is gone, and one in its place
FINISHED, BROKEN_OFF = "true", "false"  # the last request
LONGEST_CAUSE = 300  # characters of an error that are shown

log = logging.getLogger(__name__)


class TrackerFailedError(Exception):
    """The tracker's process said why, or ended."""


class Tracker:
    """Keeps one tracker told; no call but `leave_by` waits."""

    def __init__(
        self,
        name: str,
        run: Line,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        """
        Args:
            run: the line of the run (`run_line`).
            settings: the job's, flat; with `project` the worker's own, see `worker`.
            environment: of the process.
            folder: where the process works and its files go; made where missing, as the folder above it.
        """
        self.name = name
        self._opening = {"tracker": name, "run": run, "folder": str(folder), **settings}
        self._environment, self._folder = environment, folder
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._queue: deque[LoggedRecord] = deque()
        self._pending: list[LoggedRecord] = []
        self._dropped, self._said = 0, set[str]()
        self._finishing, self._leaving, self._last = threading.Event(), False, BROKEN_OFF
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # of the process's beginning and end
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, record: LoggedRecord) -> None:
        if len(self._queue) < QUEUE_LENGTH:
            self._queue.append(record)
        else:
            self._dropped += 1
            self._say_once("full", "does not keep up with the run: records are dropped, training goes on")

    def finish(self, *, finished: bool) -> None:
        """No more comes: the run is `finished`, or stopped, or failed."""
        self._last = FINISHED if finished else BROKEN_OFF
        self._finishing.set()

    def leave_by(self, deadline: float) -> None:
        """Wait for the rest until `deadline` (time.monotonic), then end the process; says what was lost."""
        self._thread.join(timeout=max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._leaving = True
            self._kill()
        self._thread.join(timeout=1.0)
        if lost := self._dropped + len(self._pending) + len(self._queue):
            self._say_once("lost", f"{lost} records of the run did not reach it")

    def _run(self) -> None:
        last_tries = LAST_TRIES
        while not self._leaving and last_tries:
            done = self._finishing.wait(INTERVAL_SECONDS)
            try:
                self._send_all()
                if done and not self._queue:
                    self._end()
                    return
            except Exception as error:
                self._failed(error)
                last_tries -= done
                self._finishing.wait(self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _send_all(self) -> None:
        while self._pending or self._queue or self._process is None:
            if self._process is None:
                self._start()
                opening = text(self._opening)
                self._opening["again"] = True  # a later process goes on with what this one has begun, if only in part
                self._ask(opening)
            while self._queue and len(self._pending) < BATCH_LENGTH:
                self._pending.append(self._queue.popleft())
            if self._pending:
                self._ask(f"[{','.join(filter(None, map(encoded, self._pending)))}]")
                self._pending = []
            self._pause_seconds = FIRST_PAUSE_SECONDS

    def _start(self) -> None:
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        with self._lock:
            if self._leaving:
                raise TrackerFailedError("the run has ended")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ddp.telemetry.trackers.worker"],
                cwd=self._folder,
                env=dict(self._environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a signal to the ranks is not for it
            )

    def _ask(self, request: str) -> None:
        """Send one line of JSON, and wait for its answer.

        Raises:
            TrackerFailedError: the process has an error to tell, or ends without an answer.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its answer, or its end, says more
            process.stdin.write(f"{request}\n".encode(errors=SURROGATES))
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise TrackerFailedError(f"its process ended with code {process.wait()}")
        if error := json.loads(answer)["error"]:
            raise TrackerFailedError(error)

    def _end(self) -> None:
        """Let the process finish by itself: that may take as long as an upload takes."""
        self._ask(self._last)
        self._forget_process()

    def _failed(self, error: Exception) -> None:
        if not self._leaving:
            cause = redact(" ".join(str(error).split()))
            cause = cause if len(cause) <= LONGEST_CAUSE else f"{cause[:LONGEST_CAUSE]} ..."
            self._say_once("failed", f"cannot be told of the run, training goes on: {cause}")
        with self._lock:
            self._kill()
        self._forget_process()

    def _forget_process(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what could not be sent
                    if pipe is not None:
                        pipe.close()

    def _kill(self) -> None:
        """The process and those that it has started in its session."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _say_once(self, subject: str, what: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            log.warning("%s %s", self.name, what)
