"""The gradient of a loss against centred differences, some entries of every parameter.

Relative errors |a - n| / max(|a|, |n|), in double precision. A gradient that is tiny everywhere is taken once more from a
loss times a power of two: on its way back it may have lost bits that the losses still have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddp.check.differences import FIRST_STEPS, MORE_STEPS, Entry, Probe, judge

TINY = 1e-10  # largest entry of a parameter's gradient that is scaled up
ENTRIES = 6  # of each parameter


@dataclass(frozen=True, slots=True)
class ParameterFinding:
    """What was seen of one parameter's gradient on one rank; `index`, `analytic` and `numeric` are of the worst entry.

    Attributes:
        judged: entries whose error counts, those included that are zero both ways.
        zeros: of them, those that are zero both ways.
        kinks, unresolved: entries that say nothing.
        scale: what the loss was multiplied by.
        resolved: whether the worst deviation is beyond the differences' own uncertainty.
    """

    name: str
    judged: int
    zeros: int
    kinks: int
    unresolved: int
    error: float
    index: tuple[int, ...]
    analytic: float
    numeric: float
    scale: float
    resolved: bool

    @property
    def is_dead(self) -> bool:
        """No gradient at all, and none to be had."""
        return self.judged > 0 and self.zeros == self.judged

    def entry(self) -> str:
        """The worst entry as Python writes it."""
        return f"{self.name}[{', '.join(map(str, self.index))}]" if self.index else self.name


def check_gradients(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    *,
    seed: int,
    entries: int = ENTRIES,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> list[ParameterFinding]:
    """Check the gradient of `loss()` with respect to each of `parameters`, which are moved and put back.

    Args:
        loss: a float64 tensor of shape (), the same whenever it is called.
        parameters: float64 leaves that take a gradient, by name.
        seed: of the random half of the entries; the other half are the largest.
        asked_to_stop: asked before each parameter; the rest is then left out.
    """
    names, tensors = list(parameters), list(parameters.values())
    value = loss()
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    middle, generator = float(value.detach()), np.random.default_rng(seed)
    found: list[ParameterFinding] = []
    for name, tensor, gradient in zip(names, tensors, gradients, strict=True):
        if asked_to_stop():
            break
        dense = torch.zeros_like(tensor) if gradient is None else _dense(gradient)
        scale = _scale(dense)
        if scale != 1.0:
            dense = _dense(torch.autograd.grad(scale * loss(), [tensor])[0])
        chosen = choose_entries(dense, entries, generator)
        scaled = _Scaled(loss, scale, middle)
        found.append(_of_parameter(name, scaled, tensor, dense, chosen))
    return found


def choose_entries(gradient: Tensor, count: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    """Half of them the largest, half at random, all where there are no more."""
    size = gradient.numel()
    if size <= count:
        flat: Sequence[int] = range(size)
    else:
        largest = gradient.abs().flatten().nan_to_num(posinf=math.inf).topk(count // 2).indices.tolist()
        others = [int(each) for each in generator.choice(size, min(size, 2 * count), replace=False)]
        flat = [*largest, *(each for each in others if each not in largest)][:count]
    return [tuple(int(each) for each in np.unravel_index(place, gradient.shape)) for place in flat]


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A loss as it is probed: called, times `scale`."""

    loss: Callable[[], Tensor]
    scale: float
    unscaled_middle: float

    @property
    def middle(self) -> float:
        return self.scale * self.unscaled_middle

    def __call__(self) -> float:
        return self.scale * float(self.loss().detach())  # with autograd on: some layers go another way without


def _of_parameter(
    name: str, loss: _Scaled, tensor: Tensor, gradient: Tensor, chosen: Sequence[tuple[int, ...]]
) -> ParameterFinding:
    stretch = max(1.0, float(tensor.detach().square().mean().sqrt())) if tensor.numel() else 1.0
    judged = [
        (index, float(gradient[index]), _entry(loss, tensor, index, float(gradient[index]), stretch))
        for index in chosen
    ]
    counted = [each for each in judged if each[2].kind in ("judged", "zero")]
    index, analytic, worst = max(
        counted, key=lambda each: each[2].error, default=((), math.nan, Entry("zero", math.nan, 0.0))
    )
    kinds = [entry.kind for *_, entry in judged]
    return ParameterFinding(
        name,
        judged=len(counted),
        zeros=kinds.count("zero"),
        kinks=kinds.count("kink"),
        unresolved=kinds.count("unresolved"),
        error=worst.error,
        index=index,
        analytic=analytic / loss.scale,
        numeric=worst.numeric / loss.scale,
        scale=loss.scale,
        resolved=worst.resolved,
    )


def _entry(loss: _Scaled, tensor: Tensor, index: tuple[int, ...], analytic: float, stretch: float) -> Entry:
    probes = [_probe(loss, tensor, index, step * stretch) for step in FIRST_STEPS]
    found = judge(analytic, loss.middle, probes)
    if found.is_settled:
        return found
    return judge(
        analytic, loss.middle, [*probes, *(_probe(loss, tensor, index, step * stretch) for step in MORE_STEPS)]
    )


def _probe(loss: Callable[[], float], tensor: Tensor, index: tuple[int, ...], step: float) -> Probe:
    """The entry is put back, whatever happens."""
    values, middle = tensor.detach(), float(tensor.detach()[index])
    above, below = middle + step, middle - step
    try:
        values[index] = above
        loss_above = loss()
        values[index] = below
        loss_below = loss()
    finally:
        values[index] = middle
    return Probe(above - middle, middle - below, loss_above, loss_below)


def _scale(gradient: Tensor) -> float:
    """A power of two that brings a tiny gradient's largest entry to about 1; 1 for any other."""
    largest = float(gradient.abs().max()) if gradient.numel() else 0.0
    return 2.0 ** -math.frexp(largest)[1] if 0.0 < largest < TINY else 1.0


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
