"""All that is known of the noise scale after a step: the whole model's and its parts', in two metrics.

plain            B = tr(Sigma) / |G|^2: what SGD sees
preconditioned   B = tr(P Sigma) / G'PG with Adam's P = 1/(sqrt(v) + eps), frozen before the step: what Adam sees
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddp.noise.noise_scale import SMALLEST_WINDOW, Reading

Metric = Literal["plain", "preconditioned"]
Method = Literal["ranks", "micro_batches", "split", "none"]
Part = Literal["layer", "group"]


@dataclass(frozen=True, slots=True)
class PartReading:
    """The noise scale of one layer (a module, by its name in the model) or of one of the optimizer's groups."""

    part: Part
    name: str
    metric: Metric
    reading: Reading


@dataclass(frozen=True, slots=True)
class NoiseReadings:
    """After one step.

    Attributes:
        plain: taken in every step that has two units.
        preconditioned: taken in sampled steps; None where the optimizer has no preconditioner.
        headline: the metric that fits the optimizer, once there is one.
        method: what the step's units were: its ranks, ranks x micro-batches, or two halves of one rank's batch;
            "none" where the step gave no observation.
        parts: of the layers and groups, in the model's order. Only after a step that observed them: after each of the
            first 50 and then after every fourth, since reading them all takes most of such a step's measuring.
        sampled_every: steps from one sampled step to the next, as of now; 0 where nothing is sampled.
    """

    plain: Reading
    preconditioned: Reading | None = None
    headline: Metric = "plain"
    method: Method = "ranks"
    parts: tuple[PartReading, ...] = ()
    sampled_every: int = 0

    @property
    def readable(self) -> Reading:
        """The headline reading; the plain one while the headline's window has too few observations to be read."""
        return self.reading if self.reading.observations >= SMALLEST_WINDOW else self.plain

    @property
    def reading(self) -> Reading:
        """The headline's."""
        if self.headline == "preconditioned" and self.preconditioned is not None:
            return self.preconditioned
        return self.plain
