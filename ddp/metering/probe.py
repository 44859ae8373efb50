"""Squared norms of each micro-batch's own gradient, parameter by parameter, before it is accumulated.

Leaf hooks see the gradient of one backward on its way into `.grad`, and before DDP's hook averages it. They cost a
few microseconds a parameter, so they are there in sampled steps only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ddp.noise.moments import Units
from ddp.transport.gradient_squares import Denominator, gradient_squares_, prepare


@dataclass(frozen=True, slots=True)
class UnitSums:
    """A rank's units of one step, added up."""

    units: Units
    weighted: NDArray[np.float64]  # sum v_u |g_u|^2, shape (parameters, 2): plain and preconditioned, 0 where not asked


@dataclass(slots=True)
class _Unit:
    """A backward whose sums may still be on a device."""

    sums: Tensor
    examples: float
    weight: float
    factor: float


@dataclass(slots=True)
class GradientProbe:
    """Hooks on `parameters`, between `start` and `stop`.

    Attributes:
        hook_seconds: spent inside the hooks since `start`.
    """

    parameters: Sequence[Tensor]
    hook_seconds: float = 0.0
    _denominators: Mapping[Tensor, Denominator] = field(default_factory=dict)
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    _units: list[_Unit] = field(default_factory=list)
    _sums: Tensor | None = None
    _nodes: list[Node] = field(default_factory=list)
    _times: list[int] = field(default_factory=list)

    @property
    def backwards(self) -> int:
        """Since `start` or the last `end_unit`; more than one leave the sums of the last only."""
        return max(self._times, default=0)

    def prepare(self) -> None:
        """Compile what the gradients need, outside any step."""
        prepare({each.dtype.to_real() for each in self.parameters if each.device.type == "cpu"})

    def start(self, denominators: Mapping[Tensor, Denominator] | None = None) -> None:
        """From the next backward on; with Adam's denominators preconditioned norms are taken too."""
        self.stop()
        self._denominators, self._units = denominators or {}, []
        self._times = [0] * len(self.parameters)
        self._sums = self._fresh()
        self._nodes = self._nodes or [get_gradient_edge(parameter).node for parameter in self.parameters]
        self._handles = [node.register_prehook(partial(self._measure, index)) for index, node in enumerate(self._nodes)]
        self.hook_seconds = 0.0

    def end_unit(self, examples: float, weight: float, factor: float) -> None:
        """The backward that just ended gives one unit.

        Args:
            examples: b_u, of this micro-batch.
            weight: v_u, with which its mean gradient enters the step's mean, up to a factor common to all ranks.
            factor: what makes the gradient that was accumulated the mean over this micro-batch: undoes a division
                by the rank's examples or accumulation steps, and a loss scale.
        """
        if self._sums is None:
            return
        self._units.append(_Unit(self._sums, examples, weight, factor))
        self._sums = self._fresh()
        self._times = [0] * len(self.parameters)

    def stop(self) -> UnitSums:
        """Take the hooks away; what the units since `start` add up to. Waits for the device."""
        for handle in self._handles:
            handle.remove()
        units, weighted = Units(), np.zeros((len(self.parameters), 2))
        for each in self._units:
            units += Units.one(each.examples, each.weight)
            if each.examples > 0 and each.weight > 0:
                weighted += each.weight * each.factor**2 * each.sums.cpu().numpy()
        self._handles, self._units, self._sums = [], [], None
        return UnitSums(units, weighted)

    def mean_squares(self) -> NDArray[np.float64]:
        """Squared norms of `.grad` as it stands, shape (parameters, 2), with the denominators of the last `start`."""
        sums = self._fresh()
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                gradient_squares_(sums[index], parameter.grad, self._denominators.get(parameter))
        return sums.cpu().numpy()

    def _measure(self, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Of a leaf's node in the graph: it runs on the way into `.grad` only, not for `torch.autograd.grad`.

        A function of the user's own may give no gradient; a sparse one is refused where it would be averaged.
        """
        began, gradient = time.perf_counter(), gradients[0]
        if self._sums is not None and gradient is not None and gradient.layout == torch.strided:
            self._times[index] += 1
            denominator = self._denominators.get(self.parameters[index])
            gradient_squares_(self._sums[index], gradient, denominator)
        self.hook_seconds += time.perf_counter() - began

    def _fresh(self) -> Tensor:
        return torch.zeros(len(self.parameters), 2, dtype=torch.float64, device=self.parameters[0].device)
