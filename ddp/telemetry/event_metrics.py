"""What happened to a run as Prometheus sees it: events by kind, and how saving goes.

Events that an earlier part of the run recorded are counted too (see `Station`): a run that was ended by what
happened is restarted before anybody scrapes it, and would forget it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ddp.telemetry.records import EVENT_KINDS, RunEvent


class EventMetrics:
    """Counts events and keeps the latest save; not locked, which is its owner's business."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._last_saved: RunEvent | None = None
        self._failures_since = 0
        self._save_seconds = self._stall_seconds = 0.0

    def observe(self, event: RunEvent) -> None:
        self._counts[event.kind] += 1
        if event.kind == "saved":
            self._last_saved, self._failures_since = event, 0
        if event.kind == "save_failed":
            self._failures_since += 1
        self._save_seconds += _known(event.duration_seconds)
        self._stall_seconds += _known(event.stall_seconds)

    def families(self) -> Iterator[Metric]:
        """The latest save only once there was one."""
        events = CounterMetricFamily(
            "ddp_events",
            "What happened to the run, by kind, since its start as far as it was recorded.",
            labels=("kind",),
        )
        for kind in EVENT_KINDS:
            events.add_metric((kind,), self._counts[kind])
        yield events
        yield GaugeMetricFamily(
            "ddp_checkpoint_failures_in_a_row",
            "Saves that failed since the latest one that did not.",
            self._failures_since,
        )
        yield CounterMetricFamily(
            "ddp_checkpoint_save_seconds", "Time that saving took, beside training or not.", self._save_seconds
        )
        yield CounterMetricFamily(
            "ddp_checkpoint_stall_seconds", "Of it, time for which training waited.", self._stall_seconds
        )
        if self._last_saved is None:
            return
        yield GaugeMetricFamily(
            "ddp_checkpoint_last_saved_step", "Step of the newest checkpoint.", self._last_saved.step
        )
        yield GaugeMetricFamily(
            "ddp_checkpoint_last_saved_timestamp_seconds",
            "Unix time at which the newest checkpoint was complete.",
            self._last_saved.unix_time,
        )


def _known(seconds: float) -> float:
    return 0.0 if math.isnan(seconds) else seconds
