"""The sinks of a run as one: what the trainer tells goes to each of them, and none of them can end the run.

Each sink is meant to cope with its own troubles (`recorder` with a locked database, `progress` with a closed
terminal). What one raises all the same is said once, and it hears no more: training goes on with the others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from ddp.job import redact
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    LayersRecord,
    ParametersRecord,
    RunEvent,
    Sink,
    StepRecord,
)

log = logging.getLogger(__name__)


class Sinks(Sink):
    """A `Sink` that hands each record to all others; without any, as on ranks other than 0, it does nothing."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def add(self, sink: Sink) -> None:
        """From now on `sink` hears too."""
        self._sinks.append(sink)

    def step(self, record: StepRecord) -> None:
        self._each(lambda sink: sink.step(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        self._each(lambda sink: sink.evaluation(record))

    def batch_change(self, record: BatchChange) -> None:
        self._each(lambda sink: sink.batch_change(record))

    def layers(self, record: LayersRecord) -> None:
        self._each(lambda sink: sink.layers(record))

    def event(self, record: RunEvent) -> None:
        told = replace(record, text=redact(record.text))  # it may have an error's words
        self._each(lambda sink: sink.event(told))

    def parameters(self, record: ParametersRecord) -> None:
        self._each(lambda sink: sink.parameters(record))

    def close(self) -> None:
        """Safe to call twice where that is safe for each sink."""
        self._each(lambda sink: sink.close())

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                tell(sink)
            except Exception as error:
                self._drop(sink, error)

    def _drop(self, sink: Sink, error: Exception) -> None:
        self._sinks.remove(sink)
        with contextlib.suppress(Exception):  # a handler of the log may be what is broken
            log.warning(
                "%s fails and hears no more of the run, training goes on: %s: %s",
                *(type(sink).__name__, type(error).__name__, error),
                exc_info=log.isEnabledFor(logging.DEBUG),
            )
        with contextlib.suppress(Exception):
            sink.close()
