"""From the averaged gradient to the next weights: rates, clipping, the optimizer's step, the averaged weights."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp.job import OptimizerSection
from ddp.training.averaged_weights import AveragedWeights
from ddp.training.optimizers import clip_, set_momentum_, set_rate_


class Update:
    """One rank's; all ranks make the same one of the same gradient."""

    def __init__(
        self,
        section: OptimizerSection,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        averaged: AveragedWeights | None,
    ) -> None:
        self._section, self._model, self._optimizer, self._averaged = section, model, optimizer, averaged

    def take(self, step: int, rate: float, norm: float, momentum: float) -> None:
        """Step with the gradients in `.grad`, whose norm over all weights is `norm`; they are gone then.

        `momentum` counts where the job has it follow a schedule.
        """
        set_rate_(self._optimizer, rate)
        if self._section.final_momentum is not None:
            set_momentum_(self._optimizer, momentum)
        if self._section.gradient_clip_norm is not None:
            clip_(self._optimizer, self._model.parameters(), norm, self._section.gradient_clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._averaged is not None:
            self._averaged.observe(step)


def momentum_of(optimizer: Optimizer) -> float:
    """That of the first group, Adam's first beta; NaN where the optimizer has none."""
    group = optimizer.param_groups[0]
    return float(group.get("momentum", group.get("betas", (float("nan"),))[0]))
