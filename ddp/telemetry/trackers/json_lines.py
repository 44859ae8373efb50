"""`log.jsonl`: the run as lines of JSON, for whoever reads along with `tail` and `jq`.

Written on a thread of its own about once a second; each time the file is opened by name and appended to. Like the record
it forgets the steps that a resume or a roll-back takes again, by writing what stays anew; events stay. A file that cannot
be written costs lines, said once, and never the run; lines wait meanwhile as long as there is room for them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ddp.job import redact
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
)
from ddp.telemetry.trackers.lines import SURROGATES, LoggedRecord, encoded

FILE_NAME = "log.jsonl"
QUEUE_LENGTH = 20_000  # records
CLOSE_SECONDS = 10.0  # that the end of a run waits for a disk which does not answer
LINES_WITH_STEPS = ("step", "evaluation", "batch_change")  # that a step taken again replaces

log = logging.getLogger(__name__)


class JsonLines(Sink):
    """A `Sink` that appends to one file, continuing one that a resumed run has."""

    def __init__(self, path: Path, info: RunInfo, *, interval_seconds: float = 1.0) -> None:
        """
        Args:
            path: the file; made where missing, its owner's alone.
            info: the run; lines of steps after `info.start_step` are taken out.
            interval_seconds: longest time that a line waits for others to be written with it.
        """
        self._path, self._interval_seconds = path, interval_seconds
        self._queue: deque[RunInfo | LoggedRecord] = deque([info])
        self._pending: list[RunInfo | LoggedRecord] = []  # the thread's own
        self._lost, self._warned = 0, False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log.jsonl", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        self._put(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._put(record)

    def batch_change(self, record: BatchChange) -> None:
        self._put(record)

    def event(self, record: RunEvent) -> None:
        self._put(record)

    def close(self) -> None:
        """Write what is left. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(timeout=CLOSE_SECONDS)
        if missing := self._lost + len(self._pending) + len(self._queue):
            log.warning("%s: %d lines were not written", self._path, missing)

    def _put(self, record: LoggedRecord) -> None:
        if len(self._pending) + len(self._queue) >= QUEUE_LENGTH:
            self._lost += 1
            self._warn("it does not keep up with the run")
        else:
            self._queue.append(record)

    def _run(self) -> None:
        while True:
            closing = self._closing.wait(self._interval_seconds)
            try:
                while self._queue or self._pending:
                    self._write_some()
            except OSError as error:
                self._warn(error.strerror or str(error))
            if closing:
                return

    def _write_some(self) -> None:
        """What has gathered, up to the next record that wants steps forgotten; that one, if it is the first."""
        while self._queue:
            self._pending.append(self._queue.popleft())
        first = self._pending[0]
        if isinstance(first, RunInfo):
            _forget_steps_after(self._path, first.start_step)
        elif _takes_back(first):
            _forget_steps_after(self._path, first.step)
        count = next((i for i, each in enumerate(self._pending) if i and _takes_back(each)), len(self._pending))
        lines = [redact(encoded(each)) for each in self._pending[:count]]
        _append(self._path, "".join(f"{each}\n" for each in lines if each).encode(errors=SURROGATES))
        if bad := lines.count(""):
            self._warn("a record is none")
            self._lost += bad
        del self._pending[:count]

    def _warn(self, cause: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s: is incomplete, training goes on: %s", self._path, cause)


def _takes_back(record: RunInfo | LoggedRecord) -> bool:
    return isinstance(record, RunEvent) and record.kind == "rolled_back"


def _append(path: Path, content: bytes) -> None:
    """All of it or, with an error, none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        before = os.fstat(descriptor).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def _forget_steps_after(path: Path, step: int) -> None:
    """Write the file anew without lines of later steps, and without a line that a kill has cut. Nothing where none is there."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if all(_stays(each, step) for each in file):
                return
            file.seek(0)
            _replace(path, (each for each in file if _stays(each, step)))


def _replace(path: Path, lines: Iterator[bytes]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # left by a kill
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            _copy(lines, file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _copy(lines: Iterator[bytes], file: BinaryIO) -> None:
    for each in lines:
        file.write(each)
    file.flush()


def _stays(content: bytes, step: int) -> bool:
    if not content.endswith(b"\n"):
        return False
    try:
        value: Any = json.loads(content)
        return value["kind"] not in LINES_WITH_STEPS or value["step"] <= step
    except (ValueError, TypeError, LookupError, RecursionError):
        return True  # somebody else's line
