"""What looks into a training step without changing it: the watch over layers, the record of chosen parameters."""

from __future__ import annotations

from typing import Protocol

from ddp.telemetry.sinks import Sinks


class StepObserver(Protocol):
    """Asked in every step, on all ranks alike; called in those that it wants and that are taken."""

    def wants(self, step: int) -> bool:
        """Whether to be called in `step` (1 for the first); the same on all ranks."""
        ...

    def before_forward(self, step: int) -> None:
        """Before the first forward. A step that then is not finite has no further call."""
        ...

    def before_update(self, step: int) -> None:
        """The averaged gradients are in `.grad`, neither clipped nor scaled. May be collective."""
        ...

    def after_update(self, step: int, sinks: Sinks) -> None:
        """The weights are those after the step. May be collective; rank 0's sinks take records, others' are empty."""
        ...
