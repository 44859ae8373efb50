"""Everything that rank 0 tells the outside about one run, opened and closed as one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import takewhile
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from ddp.job import MetricsSection, TrackersSection
from ddp.noise.advice import advise
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.goodput import Goodput
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.metrics_server import MetricsServer, serve
from ddp.telemetry.progress import Progress, duration_text, moment_text
from ddp.telemetry.record_values import readable
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import (
    open_recording,
    read_batch_changes,
    read_evaluations,
    read_events,
    read_parts,
    read_steps,
    read_times,
    replay,
)
from ddp.telemetry.records import RunInfo
from ddp.telemetry.report import write_report
from ddp.telemetry.sinks import Sinks
from ddp.telemetry.summary import History, summary
from ddp.telemetry.targets import publish
from ddp.telemetry.tls import tls_context
from ddp.telemetry.trackers.group import Trackers, check_trackers
from ddp.telemetry.trackers.json_lines import FILE_NAME, JsonLines
from ddp.telemetry.warning_sink import WarningSink

RECORD = "run.db"
NO_REPORT_VARIABLE = "DDP_NO_REPORT"  # set by `ddp sweep` for its trials: `ddp report` can still draw one

logger = logging.getLogger(__name__)


class Station:
    """Metrics from the start, the record and the progress line once the run has a directory.

    Raises:
        UsageError: the metrics port cannot be had, or a tracker is not installed; nothing is left open.
    """

    def __init__(
        self,
        section: MetricsSection,
        info: RunInfo,
        critical_batches: Sequence[CriticalBatch] = (),
        trackers: TrackersSection | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        warns: bool = True,
    ) -> None:
        """
        Args:
            critical_batches: what runs have measured (see `read_critical_batches`), shown beside the noise scale.
            trackers: which ones hear of the run.
            settings: the job's, flat, for the trackers.
            warns: whether what looks wrong is said in words.
        """
        self._tracked, self._settings = trackers or TrackersSection(), settings or {}
        check_trackers(self._tracked)
        self._info, self._critical_batches = info, critical_batches
        self._history = History(info)
        self._open = ExitStack()
        self._run_directory = Path()
        self._interruptions = 0
        self.goodput = Goodput(time.time())  # its state belongs into checkpoints
        self.sinks = Sinks([self.goodput])
        self.warner = WarningSink(info, self.sinks.event) if warns else None  # its state belongs there too
        self.server: MetricsServer | None = None
        if section.enabled:
            registry = CollectorRegistry()
            self.sinks.add(Metrics(registry, info, critical_batches, self.goodput))
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
        self.sinks.add(self._history)
        for sink in (recorder, JsonLines(run_directory / FILE_NAME, self._info), Progress(self._info)):
            self.sinks.add(sink)
            self._open.callback(sink.close)
        if self._tracked.names:
            trackers = Trackers(self._tracked, self._info, self._settings, run_directory)
            self.sinks.add(trackers)
            self._open.callback(trackers.abandon)
        if self.warner is not None:
            self.sinks.add(self.warner)  # after those that hear what it says
        if self.server is not None:
            target = publish(
                run_directory.parent / "targets", self._info.run_id, self.server.address, self.server.scheme
            )
            self._open.callback(target.close)

    def finish(self) -> str:
        """After the last step: close the record, write the report, and give the summary's text."""
        self.sinks.close()
        report = self._report()
        return summary(
            self._info,
            self._history,
            advice=self._advice(),
            goodput=self._goodput_text(),
            report_path=report,
            metrics_url=self.server.url if self.server else None,
        )

    def close(self) -> None:
        """Release all of it, also after an error. Safe to call twice."""
        self._open.close()

    def _report(self) -> Path | None:
        """Its path; a report that cannot be drawn must not fail a run that is done."""
        if NO_REPORT_VARIABLE in os.environ:
            return None
        try:
            return write_report(self._run_directory)
        except Exception as error:
            logger.warning("no report of this run: %s", error)
            return None

    def _goodput_text(self) -> str | None:
        """Where the run was interrupted; without that it only says how long start-up and evaluations take."""
        rolled_back = sum(event.kind == "rolled_back" for event in self._history.events)
        if not self._interruptions and not rolled_back:
            return None
        now = time.time()
        again = [f"{self._interruptions} interruption{'s' * (self._interruptions > 1)}"] if self._interruptions else []
        again += [f"{rolled_back} roll-back{'s' * (rolled_back > 1)}"] if rolled_back else []
        all_time = duration_text(now - self.goodput.began_unix_time)
        return f"{100 * self.goodput.ratio(now):.1f} % of {all_time} went into steps that count; {', '.join(again)}"

    def _advice(self) -> str | None:
        timed = self._history.advised
        if timed is None:
            return None
        when = moment_text(self._info, timed.step, timed.epoch)
        return advise(timed.reading, timed.global_batch_size, when, timed.metric, timed.method, self._info.sampled)

    def _recall(self, record: Path) -> None:
        """After a resume the summary speaks of the whole run: hand it what earlier parts recorded.

        What happened is told to the metrics too, also of steps that this part takes again.
        """
        if not record.exists():
            return
        until, history = self._info.start_step, History(self._info)
        try:
            with closing(open_recording(record)) as database, readable(record):
                parts, events, times = read_parts(database), read_events(database), read_times(database, until)
                for event in events:
                    history.event(event)
                steps = takewhile(lambda each: each.step <= until, read_steps(database))
                evaluations = [each for each in read_evaluations(database) if each.step <= until]
                changes = takewhile(lambda each: each.step <= until, read_batch_changes(database))
                replay(steps, evaluations, changes, history)
        except Exception as error:  # damaged, perhaps: a run must not fail for what it was
            # Whoever keeps what is logged must not keep the error: it has the database's cursors, which lock the file.
            logger.warning("the summary will not know the steps before this part: %s", str(error))
            return
        self._history, self._interruptions = history, len(parts)
        if self.warner is not None:
            self.warner.recall(evaluations, events)
        for event in events:
            self.sinks.event(event)  # the history, the record and the progress line are not among them yet
        if times is not None:
            self.goodput.recall(times[0], times[2], until)
