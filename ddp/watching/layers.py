"""What one look at a step found in each layer: values, the same on all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ddp.watching.histogram import Histogram


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """One module that has parameters of its own or is an activation function, in one watched step.

    Norms are Euclidean, over all of the layer's trained parameters; NaN where it has none. Activations are its outputs
    for all examples of the step over all ranks, in training mode.

    Attributes:
        name: its path in the model, with " (call 2)" behind it where an activation function is called again.
        kind: its class.
        after: path of the layer with parameters that was called before it; "" where there was none.
        is_output: no layer with parameters is called after it.
        weight_norm: before the update.
        gradient_norm: of the averaged gradient, before clipping.
        activation_mean, activation_std: over all outputs; NaN where they were not seen.
        units: channels of a convolution, else features; 0 where they are not counted (no activation function with a
            dead or flat part).
        dead_units: those whose output was zero for all examples of the latest watched steps.
        saturated_units: those whose output was near its limits in almost all of them.
        examples: that the last two are taken over.
    """

    name: str
    kind: str
    after: str = ""
    is_output: bool = False
    weight_norm: float = math.nan
    update_norm: float = math.nan
    gradient_norm: float = math.nan
    gradients: Histogram | None = None
    activations: Histogram | None = None
    activation_mean: float = math.nan
    activation_std: float = math.nan
    units: int = 0
    dead_units: int = 0
    saturated_units: int = 0
    examples: int = 0

    @property
    def update_ratio(self) -> float:
        """Norm of the update over that of the weights, to be about 1e-3; NaN where there is none or weights are zero."""
        return self.update_norm / self.weight_norm if self.weight_norm > 0 else math.nan

    @property
    def dead_share(self) -> float:
        """NaN where units are not counted."""
        return self.dead_units / self.units if self.units else math.nan

    @property
    def saturated_share(self) -> float:
        """NaN where units are not counted."""
        return self.saturated_units / self.units if self.units else math.nan

    @property
    def called(self) -> str:
        """The layer in words: "features.1 (ReLU after features.0)"."""
        return f"{self.name} ({self.kind}{f' after {self.after}' if self.after else ''})"


@dataclass(frozen=True, slots=True)
class WeightPictures:
    """The first layer's weights, as images.

    Attributes:
        layer: its path.
        shape: (pictures, channels, height, width).
        total: filters or units of the layer; the first so many are kept.
        values: float32 in this order, little-endian.
    """

    layer: str
    shape: tuple[int, int, int, int]
    total: int
    values: bytes = field(repr=False)
