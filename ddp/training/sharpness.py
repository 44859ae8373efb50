"""Sharpness-aware minimisation: each step's gradient is that of the weights moved uphill (Foret et al. 2021, algorithm 1).

    e = rho * g_r / |g_r|        g_r: the rank's own gradient, over all its micro-batches; nothing is sent
    g = mean over ranks of the gradient at w + e, each at its own e      the step's one all-reduce

With R ranks this is the paper's m-sharpness, m = the examples of a rank: the ranks' number is part of the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ddp.training.random_state import random_state, restore_random_state


class Sharpness:
    """Moves a model's weights along its gradient for a while.

    Args:
        module: plain, not DDP's wrapper.
        rho: how far, as a Euclidean distance over all weights that are trained.
    """

    def __init__(self, module: nn.Module, rho: float) -> None:
        self._module, self._rho = module, rho
        self._parameters: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._weights = [torch.empty_like(parameter) for parameter in self._parameters]

    @contextmanager
    def uphill(self, own_gradient: Callable[[], None]) -> Iterator[None]:
        """While it lasts, the weights are where `own_gradient`, which fills `.grad`, points to; then as before, bit for bit.

        The second pass draws the same random numbers as the first, so that both are of the same function, and leaves
        running statistics alone, which the first has moved already. An own gradient of zero, or one that is not
        finite, moves nothing.
        """
        before = random_state()
        own_gradient()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in gradients))
        restore_random_state(before)
        self._move(self._rho / norm if norm > 0 and math.isfinite(norm) else 0.0)
        try:
            with still_statistics(self._module):
                yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._weights)

    @torch.no_grad()
    def _move(self, factor: float) -> None:
        torch._foreach_copy_(self._weights, self._parameters)
        for parameter in self._parameters:
            if parameter.grad is not None:
                if factor:
                    parameter.add_(parameter.grad, alpha=factor)
                parameter.grad.zero_()


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Normalisation layers go by the batch as before and leave their running statistics, counters included, alone."""
    layers = [each for each in module.modules() if isinstance(each, _NormBase) and each.track_running_stats]
    statistics: list[Tensor] = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in statistics]
    try:
        yield
    finally:
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
