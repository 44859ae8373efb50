"""From the vector that ranks have added up to the statistics of each layer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ddp.watching.histogram import Histogram, bins
from ddp.watching.layers import LayerStatistics

WEIGHT_SUMS = 3  # squares of the weights before the update, of the update, of the gradient
PLACE_SUMS = 5  # values, outputs of each unit, examples of those, sum of the values, sum of their squares
ENOUGH_EXAMPLES = 100  # of the newest looks, in all of which a unit was dead or saturated
MOST_LOOKS = 64  # that this may take
SATURATED = 0.05  # of a unit's outputs that are lively, at most


@dataclass(frozen=True, slots=True)
class PlaceKind:
    """What is known of a place before anything is seen of it.

    Attributes:
        kind: class of its module.
        saturates: outputs that pass no gradient on are near a limit, not zero.
        units: that are counted; 0 for none.
    """

    name: str
    kind: str
    has_parameters: bool
    saturates: bool
    units: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where in the vector: the same on all ranks.

    Float64, one after the other: WEIGHT_SUMS of each of `weights`; their gradients' histograms, if any (bins, and one for
    what is not finite); PLACE_SUMS of each of `places`; their histograms; the lively outputs of their units.

    Attributes:
        weights: names and classes of the layers with trained parameters.
        order: of the places, as they were called.
    """

    bins_per_octave: int
    weights: tuple[tuple[str, str], ...]
    gradients: bool
    places: tuple[PlaceKind, ...]
    order: tuple[int, ...]


class UnitMemory:
    """Lively outputs of each place's units over the latest looks."""

    def __init__(self) -> None:
        self._looks: dict[str, deque[tuple[NDArray[np.float64], float, float]]] = {}

    def observe(
        self, place: PlaceKind, lively: NDArray[np.float64], outputs: float, examples: float
    ) -> tuple[int, int]:
        """Take one look in; units that were out of play, and examples, over the latest ones.

        Args:
            lively: of each unit, outputs that pass a gradient on.
            outputs: of each unit, all.
        """
        looks = self._looks.setdefault(place.name, deque(maxlen=MOST_LOOKS))
        if outputs:
            looks.append((lively, outputs, examples))
        while len(looks) > 1 and sum(each for _, _, each in looks) - looks[0][2] >= ENOUGH_EXAMPLES:
            looks.popleft()
        if not looks:
            return 0, 0
        whole = np.sum([each for each, _, _ in looks], axis=0)
        allowed = SATURATED * sum(each for _, each, _ in looks) if place.saturates else 0.0
        return int((whole <= allowed).sum()), round(sum(each for _, _, each in looks))


def read_look(vector: NDArray[np.float64], layout: Layout, memory: UnitMemory) -> list[LayerStatistics]:
    """The layers in the order in which they were called; those that were not (or not seen) come last."""
    reader = _Reader(vector, layout.bins_per_octave)
    weights = _read_weights(reader, layout)
    layers: dict[int, LayerStatistics] = dict(zip(layout.order, _read_places(reader, layout, memory), strict=True))
    result = [
        replace(weights.pop(layer.name, layer), **_seen(layer)) if layout.places[index].has_parameters else layer
        for index, layer in layers.items()
    ]
    return [*result, *weights.values()]


class _Reader:
    """Takes the vector from its beginning to its end."""

    def __init__(self, vector: NDArray[np.float64], bins_per_octave: int) -> None:
        self._vector, self._place, self._bins_per_octave = vector, 0, bins_per_octave

    def take(self, count: int, width: int = 1) -> NDArray[np.float64]:
        begin, self._place = self._place, self._place + count * width
        return self._vector[begin : self._place].reshape(count, width)

    def histograms(self, count: int) -> list[Histogram]:
        rows = np.rint(self.take(count, bins(self._bins_per_octave) + 1)).astype(np.int64).tolist()
        return [Histogram(self._bins_per_octave, tuple(row[:-1]), row[-1]) for row in rows]


def _read_weights(reader: _Reader, layout: Layout) -> dict[str, LayerStatistics]:
    norms = np.sqrt(reader.take(len(layout.weights), WEIGHT_SUMS)).tolist()
    gradients: Sequence[Histogram | None] = [None] * len(layout.weights)
    if layout.gradients:
        gradients = reader.histograms(len(layout.weights))
    return {
        name: LayerStatistics(
            name, kind, weight_norm=weight, update_norm=update, gradient_norm=gradient, gradients=histogram
        )
        for (name, kind), (weight, update, gradient), histogram in zip(layout.weights, norms, gradients, strict=True)
    }


def _read_places(reader: _Reader, layout: Layout, memory: UnitMemory) -> list[LayerStatistics]:
    """In the order in which they were called."""
    sums = reader.take(len(layout.places), PLACE_SUMS)
    histograms = reader.histograms(len(layout.places))
    units = [reader.take(place.units)[:, 0] for place in layout.places]
    found: list[LayerStatistics] = []
    after = ""
    for index in layout.order:
        place, (values, outputs, examples, total, squares) = layout.places[index], sums[index].tolist()
        seen = LayerStatistics(place.name, place.kind, after, activations=histograms[index])
        mean = total / values if values else math.nan
        seen = replace(seen, activation_mean=mean, activation_std=_deviation(squares, values, mean))
        if place.units:
            lost, looked_at = memory.observe(place, units[index], outputs, examples)
            kind = "saturated_units" if place.saturates else "dead_units"
            seen = replace(seen, units=place.units, examples=looked_at, **{kind: lost})
        found.append(seen)
        after = place.name if place.has_parameters else after
    last = max((number for number, index in enumerate(layout.order) if layout.places[index].has_parameters), default=0)
    return [replace(layer, is_output=number >= last) for number, layer in enumerate(found)]


def _deviation(squares: float, values: float, mean: float) -> float:
    variance = squares / values - mean * mean if values else math.nan
    return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan


def _seen(layer: LayerStatistics) -> dict[str, object]:
    """What its outputs tell of a layer with weights."""
    names = ("after", "is_output", "activations", "activation_mean", "activation_std")
    return {name: getattr(layer, name) for name in names}
