"""The layers' statistics as Prometheus sees them: at most `MOST_LAYERS` of each kind, chosen once. All are in `run.db`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from ddp.telemetry.noise_metrics import MOST_LAYERS, gauge
from ddp.telemetry.records import LayersRecord
from ddp.watching.layers import LayerStatistics

FAMILIES: tuple[tuple[str, str, Callable[[LayerStatistics], float]], ...] = (
    (
        "ddp_update_to_weight_ratio",
        "Norm of a layer's update over that of its weights, to be about 1e-3",
        lambda layer: layer.update_ratio,
    ),
    (
        "ddp_dead_units_ratio",
        "Units whose output was zero for all examples of the latest watched steps",
        lambda layer: layer.dead_share,
    ),
    (
        "ddp_saturated_units_ratio",
        "Units whose output stayed near its limits in the latest watched steps",
        lambda layer: layer.saturated_share,
    ),
)


class LayerMetrics:
    """Keeps the latest look; not locked, which is its owner's business."""

    def __init__(self) -> None:
        self._record: LayersRecord | None = None
        self._shown: dict[str, tuple[str, ...]] = {}  # layers of each family

    def observe(self, record: LayersRecord) -> None:
        self._record = record
        for name, _, value in FAMILIES:
            known = [layer.name for layer in record.layers if not math.isnan(value(layer))]
            if known and name not in self._shown:
                self._shown[name] = _spread(known)

    def families(self) -> Iterator[Metric]:
        """Nothing before the first look."""
        if self._record is None:
            return
        layers = {layer.name: layer for layer in self._record.layers}
        for name, text, value in FAMILIES:
            samples = [
                ({"layer": shown}, value(layers[shown])) for shown in self._shown.get(name, ()) if shown in layers
            ]
            if samples:
                yield gauge(name, f"{text}; at most {MOST_LAYERS} layers.", *samples)
        yield GaugeMetricFamily("ddp_watched_step", "The latest step whose layers were looked at.", self._record.step)


def _spread(names: list[str]) -> tuple[str, ...]:
    """At most `MOST_LAYERS`, evenly spread, the first and the last among them."""
    if len(names) <= MOST_LAYERS:
        return tuple(names)
    return tuple(names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS))
