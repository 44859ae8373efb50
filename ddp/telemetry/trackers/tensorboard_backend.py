"""TensorBoard: event files in the run's directory, by tensorboard's own writer. No TensorFlow, no torch.

A step that is taken again, after a resume or a roll-back, replaces what was written of it: TensorBoard drops what comes
after a new session's first step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text import metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

from ddp.telemetry.trackers.scalars import scalars

events: Any = event_pb2  # made while running: no names that a type checker would know
summaries: Any = summary_pb2


class TensorBoard:
    """Each batch is on the disk when `write` returns."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        run = opening["run"]
        self._metric = run["metric"]
        self._writer = EventFileWriter(opening["folder"])
        if not opening.get("again"):
            self._begin_after(run["start_step"], time.time())
            self._text("job", json.dumps(opening["settings"], indent=2), run["start_step"])
        self._writer.flush()

    def write(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["kind"] == "event":
                self._begin_after(line["step"], line["unix_time"])
            if values := scalars(line, self._metric):
                summary = summaries.Summary(
                    value=[summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
                )
                self._writer.add_event(events.Event(wall_time=line["unix_time"], step=line["step"], summary=summary))
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        self._writer.close()

    def _begin_after(self, step: int, unix_time: float) -> None:
        self._writer.add_event(
            events.Event(
                wall_time=unix_time,
                step=step + 1,
                session_log=events.SessionLog(status=events.SessionLog.START),
            )
        )

    def _text(self, tag: str, text: str, step: int) -> None:
        """As a block of code, which Markdown leaves as it is."""
        block = "\n".join(f"    {line}" for line in text.splitlines())
        value = summaries.Summary.Value(
            tag=tag,
            metadata=metadata.create_summary_metadata(display_name=tag, description=""),
            tensor=tensor_util.make_tensor_proto([block.encode()], shape=(1,)),
        )
        self._writer.add_event(events.Event(step=step, summary=summaries.Summary(value=[value])))
