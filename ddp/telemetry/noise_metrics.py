"""The noise scale, in both metrics and by layer, and measured critical batch sizes as Prometheus sees them.

A metric label says plain or preconditioned; the headline's info series says which of the two fits the optimizer.
Layers are named by the user's model and so might be any number: at most `MOST_LAYERS` are shown, evenly spread over the
model and chosen once, so that no series comes and goes. All of them are in `run.db`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from ddp.noise.efficiency import data_efficiency
from ddp.noise.noise_scale import Reading, State
from ddp.noise.readings import NoiseReadings, PartReading
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.records import headline_metric

MOST_LAYERS = 32
NAME = "ddp_gradient_noise_scale"
ENDS = ("low", "point", "high")


class NoiseMetrics:
    """Keeps the latest readings; not locked, which is its owner's business."""

    def __init__(self) -> None:
        self._noise: NoiseReadings | None = None
        self._global_batch_size = 0
        self._method = "none"  # by which the latest observation was made
        self._layers: frozenset[str] = frozenset()
        self._parts: tuple[PartReading, ...] = ()  # of the latest step that observed them

    def observe(self, noise: NoiseReadings, global_batch_size: int) -> None:
        """After one step of `global_batch_size` examples."""
        self._noise, self._global_batch_size = noise, global_batch_size
        if noise.method != "none":
            self._method = noise.method
        if noise.parts:
            self._parts = noise.parts
            self._layers = self._layers or shown_layers(noise.parts)

    def families(self) -> Iterator[Metric]:
        """Nothing before the first step and where the noise scale is off."""
        if self._noise is None:
            return
        readings: dict[str, Reading] = {"plain": self._noise.plain}
        if self._noise.preconditioned is not None:
            readings["preconditioned"] = self._noise.preconditioned
        yield from _reading_families(readings)
        headline = {"metric": headline_metric(self._noise), "method": self._method}
        yield InfoMetricFamily(
            f"{NAME}_headline", "The metric that fits the optimizer, and how a step's units are made.", value=headline
        )
        yield GaugeMetricFamily(
            f"{NAME}_sampled_every_steps",
            "Steps from one sampled step to the next: micro-batches, layers, preconditioned norms; 0 where none is.",
            self._noise.sampled_every,
        )
        yield _efficiency_family(self._noise.reading, self._global_batch_size)
        if self._layers:
            yield self._layer_family()

    def _layer_family(self) -> Metric:
        samples = [
            ({"layer": each.name, "metric": each.metric}, each.reading.noise_scale)
            for each in self._parts
            if each.part == "layer" and each.name in self._layers
        ]
        text = f"Noise scale of single layers, at most {MOST_LAYERS} of them; NaN while unresolved."
        return gauge("ddp_layer_noise_scale_examples", text, *samples)


def shown_layers(parts: Sequence[PartReading]) -> frozenset[str]:
    """Names of at most `MOST_LAYERS` layers, evenly spread in the model's order, the first and last among them."""
    names = list(dict.fromkeys(each.name for each in parts if each.part == "layer"))
    if len(names) > MOST_LAYERS:
        names = [names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
    return frozenset(names)


def _reading_families(readings: dict[str, Reading]) -> Iterator[Metric]:
    """One family for each number of a reading, one sample for each metric."""
    for name, field, text in (
        (f"{NAME}_examples", "noise_scale", "Gradient noise scale B = <S>/<|G|^2> now."),
        (f"{NAME}_low_examples", "low", "Lower end of its 95 % confidence interval."),
        (f"{NAME}_high_examples", "high", "Upper end of its 95 % confidence interval."),
        (f"{NAME}_steps_needed", "steps_needed", "Observations until high/low <= 4 at the present rate."),
        ("ddp_gradient_squared_norm", "squared_norm", "Unbiased |G|^2 of the true gradient, mean over the window."),
        ("ddp_gradient_variance_trace", "variance_trace", "Trace of one example's gradient covariance."),
    ):
        yield gauge(name, text, *(({"metric": metric}, getattr(each, field)) for metric, each in readings.items()))
    one_hot = [
        ({"metric": metric, "state": state}, float(state == each.state))
        for metric, each in readings.items()
        for state in get_args(State)
    ]
    yield gauge(f"{NAME}_state", "1 for the state of the reading, 0 for the others.", *one_hot)


def _efficiency_family(reading: Reading, global_batch_size: int) -> Metric:
    values = zip(ENDS, (reading.low, reading.noise_scale, reading.high), strict=True)
    samples = [({"end": end}, data_efficiency(value, global_batch_size)) for end, value in values]
    text = "1/(1 + b/B) at each end of the headline noise scale B, at the global batch size b of now."
    return gauge("ddp_data_efficiency_ratio", text, *samples)


def critical_batch_families(measured: Sequence[CriticalBatch]) -> Iterator[Metric]:
    """What runs have measured; nothing where the job file names no result."""
    for name, field, text in (
        ("examples", "critical_batch_size", "Critical batch size that runs have measured for a target."),
        ("low_examples", "low", "Lower end of its 95 % confidence interval."),
        ("high_examples", "high", "Upper end of its 95 % confidence interval."),
    ):
        if measured:
            yield gauge(
                f"ddp_critical_batch_size_{name}", text, *((_labels(each), getattr(each, field)) for each in measured)
            )


def _labels(measured: CriticalBatch) -> dict[str, str]:
    return {"method": measured.method, "optimizer": measured.optimizer, "target": measured.target}


def gauge(name: str, documentation: str, *samples: tuple[dict[str, str], float]) -> GaugeMetricFamily:
    """A family of samples that all have the same labels."""
    labels = tuple(samples[0][0]) if samples else ()
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for values, sample in samples:
        family.add_metric(tuple(values.values()), sample)
    return family
