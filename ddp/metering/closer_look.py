"""What a sampled step of an attached script shows beyond its ranks' squared norms.

Leaf hooks see each backward's gradient before it is accumulated. A unit is what lies between two forwards of the model: the
script says nothing of its backwards, but one that accumulates calls the model before each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp.metering.parts import Parts, parts_of
from ddp.metering.preconditioner import preconditioner_of
from ddp.metering.probe import GradientProbe, UnitSums


@dataclass(frozen=True, slots=True)
class Look:
    """One sampled step of one rank; gradients as they were accumulated and averaged, with whatever loss scale.

    Attributes:
        own: of the rank's backwards, each with the weight 1 and as many examples as it had forwards; None where they
            could not be told apart.
        mean_squares: of the averaged gradient, shape (parameters, 2): plain and preconditioned.
        preconditioned: whether the second column was taken.
        seconds: spent on it.
    """

    own: UnitSums | None
    mean_squares: NDArray[np.float64]
    preconditioned: bool
    seconds: float


class CloserLook:
    """Takes one `Look` at a time, from the first forward of a step to the end of its averaged backward.

    Attributes:
        active: whether a sampled step is under way.
        parts: the layers and groups that have readings of their own.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[Tensor], optimizer: Optimizer | None, *, layers: bool
    ) -> None:
        self.active = False
        self.parts: Parts | None = parts_of(module, parameters, optimizer) if layers else None
        self._preconditioner = preconditioner_of(optimizer)
        self._probe = GradientProbe(parameters)
        self._probe.prepare()
        self._preconditioned = False
        self._forwards = 0
        self._told_apart = True
        self._seconds = 0.0

    def start(self) -> None:
        """Before a step's first backward, with the optimizer's second moments as they stand."""
        began = time.perf_counter()
        denominators = self._preconditioner.settled() if self._preconditioner is not None else None
        self._preconditioned = denominators is not None
        self._probe.start(denominators)
        self.active, self._forwards, self._told_apart = True, 0, True
        self._seconds = time.perf_counter() - began

    def before_forward(self) -> None:
        """The model is called with gradients: backwards before belong to earlier units."""
        if self.active:
            self._end_unit()
            self._forwards += 1

    def finish(self) -> Look:
        """After the averaged backward, while `.grad` holds the average and the optimizer has not stepped."""
        began = time.perf_counter()
        self._end_unit()
        mean = self._probe.mean_squares()
        own = self._probe.stop()
        self.active = False
        told_apart = self._told_apart and own.units.count > 0
        seconds = self._seconds + self._probe.hook_seconds + time.perf_counter() - began
        return Look(own if told_apart else None, mean, self._preconditioned, seconds)

    def drop(self) -> None:
        """Leave the step without a look, and the gradients without hooks."""
        if self.active:
            self._probe.stop()
            self.active = False

    def _end_unit(self) -> None:
        backwards = self._probe.backwards
        if not backwards:
            return
        self._told_apart = self._told_apart and backwards == 1 and self._forwards > 0
        self._probe.end_unit(self._forwards, weight=1.0, factor=1.0)
        self._forwards = 0


def after_averaging(action: Callable[[], None]) -> None:
    """Called from a comm hook: have `action` run when DDP has put the averages into `.grad`, still inside backward.

    The engine runs what was queued in the order in which it was, at the end of backward. DDP queues its own part after the
    last bucket's hook has returned; what is queued from the queue comes after that.
    """
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.queue_callback(lambda: engine.queue_callback(action))


class StepTimer:
    """Seconds from the end of one averaged backward to the end of the next."""

    def __init__(self) -> None:
        self._last: float | None = None

    def lap(self) -> float:
        """NaN the first time."""
        now, before = time.perf_counter(), self._last
        self._last = now
        return float("nan") if before is None else now - before
