"""Writes every step of a run to `run.db`, on a thread of its own and off the step's path.

Handing in a record puts it on a bounded queue; the thread writes what has gathered about once a second in
one transaction. A database that is locked, full or unwritable costs records, said once, and never the run.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.recording_writer import Record, Writer
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    LayersRecord,
    ParametersRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
)

log = logging.getLogger(__name__)

QUEUE_LENGTH = 20_000  # records; a step at 1 ms and a database that is stuck for 20 s
BATCH_LENGTH = 500  # records that are written without waiting for the second to pass


class Recorder(Sink):
    """A `Sink` that keeps all records in an SQLite file, continuing one that a resumed run has."""

    def __init__(
        self,
        path: Path,
        info: RunInfo,
        critical_batches: Sequence[CriticalBatch] = (),
        *,
        interval_seconds: float = 1.0,
        busy_seconds: float = 3.0,
    ) -> None:
        """
        Args:
            path: the database; made where missing.
            info: the run; recorded steps after `info.start_step` are replaced.
            critical_batches: what runs have measured, to be shown beside the noise scale.
            interval_seconds: longest time that a record waits for others to be written with it.
            busy_seconds: how long the thread waits for a database that somebody else has locked.
        """
        self._path, self._info, self._critical_batches = path, info, critical_batches
        self._interval_seconds, self._busy_seconds = interval_seconds, busy_seconds
        self._queue: queue.Queue[Record] = queue.Queue(QUEUE_LENGTH)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._warned = False
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        self._put(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._put(record)

    def layers(self, record: LayersRecord) -> None:
        self._put(record)

    def event(self, record: RunEvent) -> None:
        self._put(record)

    def batch_change(self, record: BatchChange) -> None:
        self._put(record)

    def parameters(self, record: ParametersRecord) -> None:
        self._put(record)

    def close(self) -> None:
        """Write what is left; waits for a locked database, but not for ever. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=4 * self._busy_seconds + 10)
        if missing := self._lost + self._queue.qsize():
            log.warning("%s: %d records of the run were not written", self._path, missing)

    def _put(self, record: Record) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lost += 1
            self._warn("it does not keep up with the run")
        if self._queue.qsize() >= BATCH_LENGTH:
            self._wake.set()

    def _run(self) -> None:
        """The thread: try to open until it works, then write batch after batch; a batch that fails is kept."""
        with contextlib.ExitStack() as stack:
            writer: Writer | None = None
            batch: list[Record] = []
            while True:
                closing = self._closing.is_set()
                try:
                    if writer is not None and not writer.is_in_place():
                        self._begin_anew(writer)
                        writer = None
                    if writer is None:
                        writer = Writer(self._path, self._info, self._critical_batches, self._busy_seconds)
                        stack.callback(writer.close)
                    batch += self._drain(QUEUE_LENGTH - len(batch))
                    writer.write(batch)
                    batch = []
                except (sqlite3.OperationalError, OSError) as error:  # locked, full, not there: may pass
                    self._warn(str(error))
                except Exception as error:  # a record that cannot be stored must not hold up those behind it
                    self._warn(str(error))
                    self._lost += len(batch)
                    batch = []
                if closing:
                    self._lost += len(batch)
                    return
                self._wake.wait(self._interval_seconds)
                self._wake.clear()

    def _begin_anew(self, writer: Writer) -> None:
        """Somebody has removed the file, or put another in its place, whose steps so far stay as they are."""
        log.warning("%s: was removed or replaced: it begins anew after step %d", self._path, writer.last_step)
        writer.close()
        self._info = replace(self._info, start_step=max(self._info.start_step, writer.last_step))

    def _drain(self, limit: int) -> list[Record]:
        records: list[Record] = []
        with contextlib.suppress(queue.Empty):
            while len(records) < limit:
                records.append(self._queue.get_nowait())
        return records

    def _warn(self, cause: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s: the record of the run is incomplete, training goes on: %s", self._path, cause)
