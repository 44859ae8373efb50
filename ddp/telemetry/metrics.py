"""The run as Prometheus sees it: one registry on rank 0, which `metrics_server` serves.

`Metrics` is a collector, not a set of gauges: a step stores its record, and a scrape turns the latest one
into samples. So a scrape shows one step as a whole (the one-hot state, the point and its ends belong
together), counters are exactly the record's totals after a resume, and a step costs microseconds.
The run's name is the target's label (see `targets`), never a label here.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.event_metrics import EventMetrics
from ddp.telemetry.goodput import Goodput
from ddp.telemetry.layer_metrics import LayerMetrics
from ddp.telemetry.noise_metrics import NoiseMetrics, critical_batch_families, gauge
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    LayersRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
)

STEP_DURATION_BUCKETS_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Durations:
    """A histogram of step durations, cumulated when it is asked for."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_DURATION_BUCKETS_SECONDS) + 1))
    sum_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(STEP_DURATION_BUCKETS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        bounds = [*(str(bound) for bound in STEP_DURATION_BUCKETS_SECONDS), "+Inf"]
        return list(zip(bounds, itertools.accumulate(map(float, self.counts)), strict=True))


class Metrics(Sink, Collector):
    """A `Sink` that answers scrapes of `registry` with the latest step and evaluation."""

    def __init__(
        self,
        registry: CollectorRegistry,
        info: RunInfo,
        critical_batches: Sequence[CriticalBatch] = (),
        goodput: Goodput | None = None,
    ) -> None:
        """
        Args:
            goodput: kept up to date by its owner; None leaves its series out.
        """
        self._goodput = goodput
        self._finished = False
        self._longest_interval_seconds = 0.0
        self._info, self._critical_batches = info, critical_batches
        self._noise = NoiseMetrics()
        self._events = EventMetrics()
        self._layers = LayerMetrics()
        self._batch_size_changes = 0
        self._lock = threading.Lock()  # the trainer writes, the server's threads read
        self._last: StepRecord | None = None
        self._evaluations: dict[str, EvaluationRecord] = {}
        self._durations = Durations()
        self._phase_seconds: dict[tuple[str, int], float] = {}
        self._all_reduce_bytes = 0
        registry.register(self)

    def step(self, record: StepRecord) -> None:
        with self._lock:
            if self._last is not None:
                interval = record.unix_time - self._last.unix_time
                self._longest_interval_seconds = max(self._longest_interval_seconds, interval)
            self._last = record
            if record.noise is not None:
                self._noise.observe(record.noise, record.global_batch_size)
            self._durations.observe(record.duration_seconds)
            self._all_reduce_bytes += record.all_reduce_bytes
            for rank, phases in enumerate(record.phase_seconds):
                for phase, seconds in phases.items():
                    self._phase_seconds[phase, rank] = self._phase_seconds.get((phase, rank), 0.0) + seconds

    def evaluation(self, record: EvaluationRecord) -> None:
        with self._lock:
            self._evaluations[record.split] = record

    def layers(self, record: LayersRecord) -> None:
        with self._lock:
            self._layers.observe(record)

    def event(self, record: RunEvent) -> None:
        with self._lock:
            self._events.observe(record)
            if record.kind == "rolled_back":
                kept = {split: each for split, each in self._evaluations.items() if each.step <= record.step}
                self._evaluations = kept

    def batch_change(self, record: BatchChange) -> None:
        with self._lock:
            self._batch_size_changes += 1

    def close(self) -> None:
        """The run is over. Nothing to release: the server belongs to whoever started it."""
        self._finished = True

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            return [
                *_run_families(self._info, finished=self._finished),
                *_goodput_families(self._goodput),
                *_step_families(self._info, self._last),
                *self._noise.families(),
                *self._events.families(),
                *self._layers.families(),
                *critical_batch_families(self._critical_batches),
                CounterMetricFamily(
                    "ddp_batch_size_changes",
                    "Times the global batch size has adapted itself, in this process.",
                    self._batch_size_changes,
                ),
                GaugeMetricFamily(
                    "ddp_step_longest_interval_seconds",
                    "Longest time between the ends of two steps in this process, evaluating and saving included.",
                    self._longest_interval_seconds,
                ),
                *_time_families(self._durations, self._phase_seconds, self._all_reduce_bytes),
                *_evaluation_families(self._last, self._evaluations),
            ]


def _goodput_families(goodput: Goodput | None) -> Iterator[Metric]:
    if goodput is None:
        return
    yield GaugeMetricFamily(
        "ddp_goodput_ratio",
        "Time of steps that count, each once, over all time since the run first began, being down included.",
        goodput.ratio(time.time()),
    )
    yield GaugeMetricFamily(
        "ddp_run_began_timestamp_seconds", "Unix time at which the run first began.", goodput.began_unix_time
    )


def _run_families(info: RunInfo, *, finished: bool) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "ddp_run",
        "What is trained and how.",
        value={
            "task": info.task,
            "optimizer": info.optimizer,
            "transport": info.transport,
            "sampling": info.sampling,
            "version": info.version,
        },
    )
    yield GaugeMetricFamily("ddp_world_size", "Ranks that train together.", info.world_size)
    yield CounterMetricFamily("ddp_restarts", "Times the run was restarted by its launcher.", info.restarts)
    yield GaugeMetricFamily("ddp_run_finished", "1 once the last step is done, 0 before.", float(finished))


def _step_families(info: RunInfo, last: StepRecord | None) -> Iterator[Metric]:
    """What the latest step says; before the first one only the counter that a resume starts from."""
    steps_total = info.start_step if last is None else last.step
    yield CounterMetricFamily(
        "ddp_steps", "Optimizer steps since the start of the run, before resumes too.", steps_total
    )
    global_batch_size = info.global_batch_size if last is None else last.global_batch_size
    yield GaugeMetricFamily(
        "ddp_global_batch_size_examples", "Examples in one step, over all ranks.", global_batch_size
    )
    if last is None:
        return
    yield CounterMetricFamily(
        "ddp_examples", "Examples trained on since the start of the run, before resumes too.", last.examples_total
    )
    yield GaugeMetricFamily("ddp_learning_rate", "Learning rate of the latest step.", last.learning_rate)
    yield GaugeMetricFamily(
        "ddp_straggler_rank", "Rank that is slow by itself, step after step; -1 none.", last.straggler_rank
    )
    yield GaugeMetricFamily(
        "ddp_straggler_slowdown_ratio",
        "Own time of the slowest rank over the median of the others', named or not, over the latest steps.",
        last.slowdown_ratio,
    )
    yield GaugeMetricFamily(
        "ddp_last_step_timestamp_seconds", "Unix time at the end of the latest step.", last.unix_time
    )


def _time_families(
    durations: Durations, phase_seconds: dict[tuple[str, int], float], all_reduce_bytes: int
) -> Iterator[Metric]:
    histogram = HistogramMetricFamily("ddp_step_duration_seconds", "Time of one optimizer step on rank 0.")
    histogram.add_metric([], durations.cumulative(), durations.sum_seconds)
    yield histogram
    phases = CounterMetricFamily(
        "ddp_phase_seconds",
        "Time each rank spent in each phase of its steps, in this process.",
        labels=("phase", "rank"),
    )
    for (phase, rank), seconds in phase_seconds.items():
        phases.add_metric((phase, str(rank)), seconds)
    yield phases
    yield CounterMetricFamily(
        "ddp_all_reduce_bytes", "Gradient bytes that rank 0 has averaged, in this process.", all_reduce_bytes
    )


def _evaluation_families(last: StepRecord | None, evaluations: dict[str, EvaluationRecord]) -> Iterator[Metric]:
    """Training loss is the latest step's; the training sample of an evaluation is found under its metrics."""
    losses = [] if last is None else [({"split": "training"}, last.loss)]
    losses += [({"split": split}, record.loss) for split, record in evaluations.items() if split != "training"]
    yield gauge("ddp_loss", "Mean loss: the latest step's (training), the latest evaluation's (other splits).", *losses)
    values = [
        ({"split": split, "name": name}, value)
        for split, record in evaluations.items()
        for name, value in {"loss": record.loss, **record.metrics}.items()
    ]
    yield gauge("ddp_evaluation_metric", "Mean over the examples of a split, at the latest evaluation.", *values)
