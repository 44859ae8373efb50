"""Everything that rank 0 tells the outside about one run, opened and closed as one."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import takewhile
from pathlib import Path

from prometheus_client import CollectorRegistry

from ddp.errors import UsageError
from ddp.job import MetricsSection
from ddp.noise.advice import advise
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.metrics_server import MetricsServer, serve
from ddp.telemetry.progress import Progress, moment_text
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_batch_changes, read_evaluations, read_steps, replay
from ddp.telemetry.records import RunInfo, Sink
from ddp.telemetry.report import write_report
from ddp.telemetry.summary import History, summary
from ddp.telemetry.targets import publish
from ddp.telemetry.tls import tls_context

RECORD = "run.db"

logger = logging.getLogger(__name__)


class Station:
    """Metrics from the start, the record and the progress line once the run has a directory.

    Raises:
        UsageError: the metrics port cannot be had; nothing is left open.
    """

    def __init__(self, section: MetricsSection, info: RunInfo, critical_batches: Sequence[CriticalBatch] = ()) -> None:
        """
        Args:
            critical_batches: what runs have measured (see `read_critical_batches`), shown beside the noise scale.
        """
        self._info, self._critical_batches = info, critical_batches
        self._history = History(info)
        self._open = ExitStack()
        self._run_directory = Path()
        self.sinks: list[Sink] = [self._history]
        self.server: MetricsServer | None = None
        if section.enabled:
            registry = CollectorRegistry()
            self.sinks.append(Metrics(registry, info, critical_batches))
            self.server = serve(
                registry,
                section.host,
                section.port,
                tls=tls_context(section),
                another_port_if_taken=info.restarts > 0,
            )
            self._open.callback(self.server.close)

    def open(self, run_directory: Path) -> None:
        """Begin to record in `run_directory`; Prometheus finds the run from now on."""
        self._run_directory = run_directory
        self._recall(run_directory / RECORD)
        recorder = Recorder(run_directory / RECORD, self._info, self._critical_batches)
        for sink in (recorder, Progress(self._info)):
            self.sinks.append(sink)
            self._open.callback(sink.close)
        if self.server is not None:
            target = publish(
                run_directory.parent / "targets", self._info.run_id, self.server.address, self.server.scheme
            )
            self._open.callback(target.close)

    def finish(self) -> str:
        """After the last step: close the record, write the report, and give the summary's text."""
        for sink in self.sinks:
            sink.close()
        report = self._report()
        return summary(
            self._info,
            self._history,
            advice=self._advice(),
            report_path=report,
            metrics_url=self.server.url if self.server else None,
        )

    def close(self) -> None:
        """Release all of it, also after an error. Safe to call twice."""
        self._open.close()

    def _report(self) -> Path | None:
        """Its path; a report that cannot be drawn must not fail a run that is done."""
        try:
            return write_report(self._run_directory)
        except Exception as error:
            logger.warning("no report of this run: %s", error)
            return None

    def _advice(self) -> str | None:
        timed = self._history.advised
        if timed is None:
            return None
        when = moment_text(self._info, timed.step, timed.epoch)
        return advise(timed.reading, timed.global_batch_size, when, timed.metric, timed.method)

    def _recall(self, record: Path) -> None:
        """After a resume the summary speaks of the whole run: hand it what earlier parts recorded."""
        if not self._info.start_step or not record.exists():
            return
        until = self._info.start_step
        try:
            with closing(open_recording(record)) as database:
                steps = takewhile(lambda each: each.step <= until, read_steps(database))
                evaluations = takewhile(lambda each: each.step <= until, read_evaluations(database))
                changes = takewhile(lambda each: each.step <= until, read_batch_changes(database))
                replay(steps, evaluations, changes, self._history)
        except (UsageError, sqlite3.Error) as error:
            logger.warning("the summary will not know the steps before this part: %s", error)
