"""Some entries of chosen parameters, with their gradients, in chosen steps: what [record] asks for.

A `StepObserver`. All ranks hold the same weights and the same averaged gradient, so all do the same, and rank 0's sinks
write it down on their own thread. Of a large parameter it takes entries that are evenly spread over it, first and last included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddp.job import RecordSection
from ddp.telemetry.records import ParameterEntries, ParametersRecord
from ddp.telemetry.sinks import Sinks
from ddp.training.patterns import matches, require_matches


class ParameterTable:
    """Takes values and gradients before the update, and hands them on after it: a step that is passed over has none."""

    def __init__(self, section: RecordSection, module: nn.Module) -> None:
        """
        Raises:
            UsageError: a pattern fits no parameter of `module`.
        """
        self._section = section
        self._chosen = [
            (name, parameter, spread_places(parameter.numel(), section.max_entries))
            for name, parameter in _chosen(section.parameters, module)
        ]
        self._taken: ParametersRecord | None = None

    def wants(self, step: int) -> bool:
        section = self._section
        return bool(self._chosen) and (step <= section.parameters_first_steps or step % section.parameters_every == 0)

    def before_forward(self, step: int) -> None:
        self._taken = None

    def before_update(self, step: int) -> None:
        """The gradients are averaged and not yet clipped."""
        with torch.no_grad():
            self._taken = ParametersRecord(step, tuple(_entries(*each) for each in self._chosen))

    def after_update(self, step: int, sinks: Sinks) -> None:
        if self._taken is not None:
            sinks.parameters(self._taken)
        self._taken = None


def spread_places(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of the places 0 to `count` - 1, evenly spread, both ends among them where there is room for two."""
    if count <= most:
        return tuple(range(count))
    if most == 1:
        return (0,)
    return tuple(round(i * (count - 1) / (most - 1)) for i in range(most))


def _chosen(patterns: Sequence[str], module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """In the model's order."""
    named = list(module.named_parameters())
    require_matches(patterns, [name for name, _ in named], "record.parameters")
    return [(name, each) for name, each in named if matches(name, patterns)]


def _entries(name: str, parameter: nn.Parameter, places: tuple[int, ...]) -> ParameterEntries:
    gradient = parameter.grad
    gradients = (math.nan,) * len(places) if gradient is None else _taken(gradient, places)
    return ParameterEntries(name, tuple(parameter.shape), places, _taken(parameter, places), gradients)


def _taken(tensor: Tensor, places: tuple[int, ...]) -> tuple[float, ...]:
    index = torch.tensor(places, dtype=torch.int64, device=tensor.device)
    return tuple(tensor.detach().take(index).double().tolist())
