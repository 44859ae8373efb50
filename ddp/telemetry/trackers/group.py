"""The trackers of a run as one `Sink`: told of every so many steps, of evaluations, and of going back."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddp.errors import UsageError
from ddp.job import TrackersSection
from ddp.telemetry.records import (
    EvaluationRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
)
from ddp.telemetry.trackers.environment import hide_secrets, tracker_environment
from ddp.telemetry.trackers.lines import plain, run_line
from ddp.telemetry.trackers.tracker import Tracker

FOLDER = "trackers"
EXTRAS = {"tensorboard": "tracking", "mlflow": "mlflow", "wandb": "wandb"}
STOP_SECONDS = 3.0  # that a run which is stopped or fails waits: the other ranks are waiting for rank 0


def check_trackers(section: TrackersSection) -> None:
    """
    Raises:
        UsageError: a tracker that the job names is not installed.
    """
    for name in section.names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name in the working directory is none
            raise UsageError(f"trackers.names: {name} is not installed: pip install -e '.[{EXTRAS[name]}]'")


class Trackers(Sink):
    """Hands records on; a step whose number `every_steps` divides, and the first one."""

    def __init__(
        self, section: TrackersSection, info: RunInfo, settings: Mapping[str, Any], run_directory: Path
    ) -> None:
        """
        Args:
            settings: the job's, flat; shown beside the run.
        """
        self._section, self._closed = section, False
        hide_secrets(os.environ)
        told = {"settings": plain(settings), "project": section.project}
        folders = {name: (run_directory / FOLDER / name).absolute() for name in section.names}
        self._trackers = [
            Tracker(name, run_line(info), told, tracker_environment(name, section, folder, os.environ), folder)
            for name, folder in folders.items()
        ]

    def step(self, record: StepRecord) -> None:
        if record.step == 1 or record.step % self._section.every_steps == 0:
            self._put(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._put(record)

    def event(self, record: RunEvent) -> None:
        if record.kind == "rolled_back":
            self._put(record)

    def close(self) -> None:
        """After the last step: wait `patience_seconds` for all of them together. Safe to call twice."""
        self._close(self._section.patience_seconds, finished=True)

    def abandon(self) -> None:
        """The run ends before its last step: wait STOP_SECONDS at most. Nothing where `close` came before."""
        self._close(min(STOP_SECONDS, self._section.patience_seconds), finished=False)

    def _close(self, patience_seconds: float, *, finished: bool) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + patience_seconds
        for tracker in self._trackers:
            tracker.finish(finished=finished)
        for tracker in self._trackers:
            tracker.leave_by(deadline)

    def _put(self, record: StepRecord | EvaluationRecord | RunEvent) -> None:
        for tracker in self._trackers:
            tracker.put(record)
