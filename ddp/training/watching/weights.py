"""How far a step moves each layer's weights, and the averaged gradient that moved them.

Weights, gradient and update are the same on all ranks, so each rank measures its share of every parameter's rows, and the
sums over ranks are the whole: the more ranks, the less each has to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddp.training.watching.counts import ValueCounts

ROOT = "model"  # the name of the outermost module, which has no path


def trained_layers(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each module that has some itself, by its path; shared ones belong to the first."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0] or ROOT, []).append(parameter)
    return layers


class LayerWeights:
    """One rank's share of all layers' sums, in a watched step."""

    def __init__(
        self, module: nn.Module, *, rank: int, world_size: int, bins_per_octave: int, histograms: bool
    ) -> None:
        self._layers = trained_layers(module)
        self._rank, self._world_size = rank, world_size
        self._bins_per_octave, self._histograms = bins_per_octave, histograms
        self._before: list[list[Tensor]] = []
        self._sums: list[list[Tensor]] = []
        self._counts: ValueCounts | None = None

    @property
    def names(self) -> list[str]:
        return list(self._layers)

    def before_update(self, device: torch.device) -> None:
        """While `.grad` holds the average over ranks."""
        self._counts = ValueCounts(len(self._layers), self._bins_per_octave, device) if self._histograms else None
        self._before, self._sums = [], []
        zero = torch.zeros((), dtype=torch.float64, device=device)
        for row, parameters in enumerate(self._layers.values()):
            weights = [self._share(parameter.detach()) for parameter in parameters]
            gradients = [
                self._share(parameter.grad)
                for parameter in parameters
                if parameter.grad is not None and parameter.grad.layout == torch.strided
            ]
            if self._counts is not None:
                for gradient in gradients:
                    self._counts.add(row, gradient)
            self._sums.append([_squares(weights, zero), _squares(gradients, zero)])
            self._before.append([each.clone() for each in weights])

    def after_update(self) -> list[Tensor]:
        """Parts of the vector to be summed over ranks, float64, in the order that `ddp.watching.look` reads."""
        parts: list[Tensor] = []
        for parameters, before, (weights, gradients) in zip(
            self._layers.values(), self._before, self._sums, strict=True
        ):
            after = [self._share(parameter.detach()) for parameter in parameters]
            moved = [now.sub(then) for now, then in zip(after, before, strict=True)]
            parts.append(torch.stack([weights, _squares(moved, torch.zeros_like(weights)), gradients]))
        if self._counts is not None:
            parts.append(self._counts.binned().view(-1))
        self.drop()
        return parts

    def drop(self) -> None:
        """Forget the step under way."""
        self._before, self._sums, self._counts = [], [], None

    def _share(self, tensor: Tensor) -> Tensor:
        """This rank's rows of it, a view."""
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        first, end = (len(rows) * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return rows[first:end]


def _squares(tensors: Sequence[Tensor], zero: Tensor) -> Tensor:
    """The sum of all elements' squares, 0-dimensional float64: within a tensor in its own precision, at least float32."""
    total = zero
    for tensor in tensors:
        wide = (tensor if tensor.dtype == torch.float64 else tensor.float()).reshape(-1)
        total = total + wide.dot(wide)
    return total
