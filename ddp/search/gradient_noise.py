"""The noise scale inside a trial: sums over separate gradients of one moment, and their average on the way to a target.

A search's trial is one process without communication, so nothing of a training run's measuring is needed: where
a step is sampled, several gradients at the same weights are taken one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddp.metering.preconditioner import preconditioner_of
from ddp.noise.moments import Moments, Units
from ddp.transport.gradient_squares import as_real

LARGEST_WINDOW = 25  # samples
WINDOWS = 8  # at least so many on the way, where there are samples enough


@dataclass(slots=True)
class GradientSums:
    """Mean gradients of several sets of examples, added up with the sums that the moments need.

    `preconditioner` has the shapes of the parameters as real numbers, or is None; it must not depend on these examples.
    """

    preconditioner: list[Tensor] | None
    units: Units = field(default_factory=Units)
    mean: list[Tensor] = field(default_factory=list)  # of all units so far
    _plain: float = 0.0
    _preconditioned: float = 0.0

    def add(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Enter the mean gradient of `examples` examples, one tensor a parameter."""
        unit = Units.one(examples)
        self._plain += examples * squared_norm(gradients, None)
        if self.preconditioner is not None:
            self._preconditioned += examples * squared_norm(gradients, self.preconditioner)
        if not self.mean:
            self.mean = [gradient.clone() for gradient in gradients]
        else:
            torch._foreach_lerp_(self.mean, list(gradients), examples / (self.units.examples + examples))
        self.units += unit

    def moments(self, population: float) -> tuple[Moments | None, Moments | None]:
        """Plain and preconditioned; None where they cannot be had."""
        plain = self.units.moments(self._plain, squared_norm(self.mean, None), population)
        if self.preconditioner is None:
            return plain, None
        whole = squared_norm(self.mean, self.preconditioner)
        return plain, self.units.moments(self._preconditioned, whole, population)


def squared_norm(gradients: Sequence[Tensor], preconditioner: Sequence[Tensor] | None) -> float:
    """|g|^2, or g'Pg with a diagonal P; squares summed in float64."""
    real = [as_real(gradient) for gradient in gradients]
    squares = torch._foreach_mul(real, real)
    if preconditioner is not None:
        torch._foreach_mul_(squares, list(preconditioner))
    return float(torch.stack([square.sum(dtype=torch.float64) for square in squares]).sum())


def adam_preconditioner(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[Tensor] | None:
    """P of each parameter, as the last step left it; None for SGD and before the first step."""
    known = preconditioner_of(optimizer)
    denominators = {} if known is None else known.denominators()
    wanted = list(parameters)
    return (
        [denominators[each].reciprocal() for each in wanted] if all(each in denominators for each in wanted) else None
    )


def average_noise_scale(samples: Sequence[tuple[int, Moments]], steps: float, batch_size: int) -> float:
    """Bbar = sum w B / sum w with w = 1/(1 + B/b), over windows of the samples up to `steps`; examples.

    Each sample (step, moments) stands for the steps until the next. With T = <tr(Sigma)> and G2 = <|G|^2> of a
    window, w B = T / (G2 + T/b) and w = G2 / (G2 + T/b): the denominator is the squared norm of the step's own mean
    gradient, which is never near 0, so that a window without a measurable G2 needs no clamping. Infinite where the
    sum over w is not above 0, NaN without samples.
    """
    chosen = [sample for sample in samples if sample[0] <= steps]
    if not chosen:
        return math.nan
    ends = [step for step, _ in chosen[1:]] + [max(steps, chosen[-1][0] + 1)]
    spans = [end - step for (step, _), end in zip(chosen, ends, strict=True)]
    size = max(1, min(LARGEST_WINDOW, len(chosen) // WINDOWS))
    noise, signal = 0.0, 0.0
    for start in range(0, len(chosen), size):
        window = list(zip(chosen[start : start + size], spans[start : start + size], strict=True))
        trace = sum(moments.variance_trace * span for (_, moments), span in window)
        squared = sum(moments.squared_norm * span for (_, moments), span in window)
        whole = squared + trace / batch_size
        if whole > 0:
            span = sum(span for _, span in window)
            noise += span * trace / whole
            signal += span * squared / whole
    return noise / signal if signal > 0 else math.inf
