"""An exponential moving average of the weights, and of running statistics, by torch's AveragedModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddp.job import AveragedWeightsSection


class AveragedWeights:
    """Of one model, on every rank: weights are the same everywhere, running statistics each rank's own.

    `module` is a model like the one that is trained, for evaluation. Its state registers in two parts, see `state`.
    """

    def __init__(self, section: AveragedWeightsSection, module: nn.Module) -> None:
        """Before the module gets hooks, which a copy would carry."""
        self._source, self._every_steps = module, section.every_steps
        self._average = AveragedModel(module, multi_avg_fn=_averaging(section.decay or 0.0), use_buffers=True)
        self._average.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        return self._average.module

    @property
    def updates(self) -> int:
        """The first takes the weights as they are."""
        return int(self._average.n_averaged)

    def observe(self, step: int) -> None:
        """After each step."""
        if step % self._every_steps == 0:
            self._average.update_parameters(self._source)

    def state_dict(self) -> dict[str, Any]:
        """How many updates there were; the tensors are `module`'s."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average.n_averaged.fill_(int(state["updates"]))


def _averaging(decay: float) -> Callable[..., None]:
    """torch's for real numbers; counters, indices and masks among the buffers are taken as they are."""
    average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averages: list[Tensor], present: list[Tensor], count: Tensor) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            average(averages, present, count)
        else:
            torch._foreach_copy_(averages, present)

    return update
