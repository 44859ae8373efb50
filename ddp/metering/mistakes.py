"""Common mistakes in scripts with `ddp.attach`, as far as gradients and calls give them away.

Each has a class that says a sentence once, or nothing: what is wrong and what to do. One cannot be told from outside: whether
the loss of each accumulated backward was divided by their number. That multiplies all gradients by one number, which
cancels in the noise scale; |G|^2 and tr(Sigma) are larger by its square.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.optim import Optimizer

_IN_A_ROW = 3  # successive steps, of some mistakes sampled ones, that must agree, so that a coincidence is none
_CHECKS = 20  # of the optimizer's gradients, after which they are believed
_NO_CLIPPING = 1000.0  # gradients that are divided by more in each step are hardly clipped alone


class KeptGradients:
    """Whether an averaged gradient was still in `.grad` when the next one was computed.

    Such a backward adds what the ranks have in common already to each one's own part, and averages it once more:
    the script trains as it would, but the ranks' gradients are no longer independent.
    """

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._node: Node | None = None
        self._averaged = False
        self._kept: Tensor | None = None
        self._said = False

    def watch(self, optimizer: Optimizer) -> None:
        """Look at the smallest parameter that `optimizer` trains; the first optimizer stays."""
        if self._parameter is None:
            trained = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
            smallest: Tensor = min(trained, key=Tensor.numel)
            self._parameter, self._node = smallest, get_gradient_edge(smallest).node  # kept: the hook goes with it
            self._node.register_prehook(self._before_accumulation)

    def averaged(self) -> Tensor | None:
        """A backward's gradients are averaged; a non-zero 0-dim tensor if they had older averages in them."""
        kept, self._kept, self._averaged = self._kept, None, True
        return kept

    def sentence(self) -> str | None:
        """To be asked when there was one."""
        if self._said:
            return None
        self._said = True
        return (
            "an averaged gradient was still in .grad when the next one was computed, so that the ranks' gradients have a "
            "part in common: such backwards are left out of the noise scale. Accumulate all backwards of a step but "
            "the last under model.no_sync(), forward included, which saves their all-reduce too, and call "
            "optimizer.zero_grad() in every step"
        )

    def _before_accumulation(self, gradients: tuple[Tensor, ...]) -> None:
        if self._averaged and self._parameter is not None:
            older = self._parameter.grad
            self._kept = None if older is None else torch.count_nonzero(older)  # stays on its device
            self._averaged = False


class UnscaledGradients:
    """Whether a script divides gradients between backward and the optimizer, as a GradScaler does.

    Clipping divides too, by another number in each step; a loss scale stays for many steps. Where both are at work the
    scale shows as a number far larger than clipping has use for.
    """

    def __init__(self) -> None:
        self._factors: deque[float] = deque(maxlen=_IN_A_ROW)
        self._left = _CHECKS

    def observe(self, optimizer: Optimizer, averaged_squared_norms: Mapping[Tensor, tuple[float, float]]) -> str | None:
        """Just before the optimizer's step.

        Args:
            averaged_squared_norms: of the newest backward by parameter: own and averaged.
        """
        factor = _scale_left_to_optimizer(optimizer) or _divided_by(optimizer, averaged_squared_norms)
        self._left -= 1
        self._factors.append(factor)
        if len(self._factors) < _IN_A_ROW or not all(map(math.isfinite, self._factors)):
            return None
        least, most = min(self._factors), max(self._factors)
        if most > (1 + 1e-4) * least and least > _NO_CLIPPING:
            self._left = 0
            return (
                f"gradients are divided by {least:.3g} to {most:.3g} between backward and the optimizer's step: is that a "
                "torch.amp.GradScaler beside clipping? |G|^2 and tr(Sigma) are too large by its scale squared, and the noise "
                "scale is wrong where it changes: ddp.attach(..., grad_scaler=scaler)"
            )
        if most > (1 + 1e-4) * least or abs(factor - 1) < 1e-3:
            return None
        self._left = 0
        return (
            f"gradients are divided by {factor:.6g} between backward and the optimizer's step: |G|^2 and tr(Sigma) are "
            f"{factor * factor:.3g} times too large, and the noise scale is wrong where that number changes. With a "
            "torch.amp.GradScaler say so: ddp.attach(..., grad_scaler=scaler)"
        )

    @property
    def over(self) -> bool:
        """Nothing more will be said."""
        return self._left <= 0


class ExamplesOfOneBackward:
    """Whether `step(examples=)` is told the examples of one backward where several were accumulated."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._in_a_row = 0
        self._said = False

    def observe(self, examples: float, backwards: int) -> str | None:
        """Of one sampled step; speaks once."""
        suspicious = backwards > 1 and examples == self._batch_size
        self._in_a_row = self._in_a_row + 1 if suspicious else 0
        if self._said or self._in_a_row < _IN_A_ROW:
            return None
        self._said = True
        return (
            f"meter.step(examples={examples:g}) is one backward's batch, and {backwards} were accumulated: the noise scale "
            f"is {backwards} times too small. Give this rank's examples over all of them, {backwards * self._batch_size}"
        )


class ForwardsWithoutBackward:
    """Whether the model is called with gradients more often than backward runs, and nobody says what that means.

    A forward whose loss is thrown away counts for nothing, two whose losses are added count double: from outside they
    look the same.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._in_a_row = 0
        self._said = False

    def observe(self, forwards: int, backwards: int) -> str | None:
        """Of one sampled step for which no examples were given; speaks once."""
        self._in_a_row = self._in_a_row + 1 if forwards > backwards else 0
        if self._said or self._in_a_row < _IN_A_ROW:
            return None
        self._said = True
        return (
            f"the model was called {forwards} times with gradients for {backwards} backward{'s' * (backwards > 1)}, and each "
            f"call is taken for {self._batch_size} examples of the gradient: where one is not (its loss is never used), put "
            "it under torch.no_grad(), or tell meter.step(examples=...) how many there were"
        )


def _scale_left_to_optimizer(optimizer: Optimizer) -> float:
    """A GradScaler leaves it to a fused optimizer to unscale; 0 where it has not."""
    scale = getattr(optimizer, "grad_scale", None)
    return float(scale) if isinstance(scale, Tensor) else 0.0


def _divided_by(optimizer: Optimizer, averaged_squared_norms: Mapping[Tensor, tuple[float, float]]) -> float:
    """By the smallest parameter whose gradient is not zero; NaN where there is none."""
    for parameter in sorted(averaged_squared_norms, key=Tensor.numel):
        averaged = averaged_squared_norms[parameter][1]
        if averaged > 0 and parameter.grad is not None and _trains(optimizer, parameter):
            now = float(parameter.grad.detach().abs().double().square().sum())
            return math.sqrt(averaged / now) if now > 0 and math.isfinite(averaged) else math.nan
    return math.nan


def _trains(optimizer: Optimizer, parameter: Tensor) -> bool:
    return any(parameter is each for group in optimizer.param_groups for each in group["params"])
