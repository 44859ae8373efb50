"""The parts of a model that have a noise scale of their own: its layers, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp.noise.readings import Part


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of the parts, and which parameter belongs to which; parts may overlap."""

    names: tuple[tuple[Part, str], ...]
    membership: NDArray[np.float64]  # shape (parts, parameters), 0 or 1

    def sums(self, by_parameter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over each part's parameters, shape (parts, ...) of (parameters, ...)."""
        with np.errstate(invalid="ignore"):  # 0 times infinity: such a step is dropped
            return self.membership @ by_parameter


def parts_of(module: nn.Module, parameters: Sequence[Tensor], optimizer: Optimizer | None = None) -> Parts:
    """A layer for each module that has parameters itself, by its path in the model; a group for each of the
    optimizer's where it has more than one.

    A parameter of the outermost module has no path: its own name stands for it. One that several modules share
    belongs to the first.
    """
    place = {parameter: index for index, parameter in enumerate(parameters)}
    layers: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        if parameter in place:
            path, _, own = name.rpartition(".")
            layers.setdefault(path or own, []).append(place[parameter])
    named: list[tuple[tuple[Part, str], list[int]]] = [(("layer", name), members) for name, members in layers.items()]
    groups = optimizer.param_groups if optimizer is not None and len(optimizer.param_groups) > 1 else []
    for index, group in enumerate(groups):
        members = [place[parameter] for parameter in group["params"] if parameter in place]
        named.append((("group", str(group.get("name", index))), members))
    membership = np.zeros((len(named), len(place)))
    for row, (_, members) in enumerate(named):
        membership[row, members] = 1.0
    return Parts(tuple(name for name, _ in named), membership)
