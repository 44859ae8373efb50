"""Adam's preconditioner as it stands before a step: P = 1 / (sqrt(v_hat) + eps), elementwise.

With P frozen before the step, and so independent of the step's examples, tr(P Sigma) and G'PG are unbiased in the
same way as tr(Sigma) and |G|^2 are: each squared norm is taken of sqrt(P) g instead of g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from ddp.noise.tracker import SETTLED_STEPS
from ddp.transport.gradient_squares import Denominator


class AdamPreconditioner:
    """Reads the second moments of torch's Adam and AdamW, fused or not; keeps nothing of its own."""

    def __init__(self, optimizer: Adam | AdamW) -> None:
        self._optimizer = optimizer

    def denominators(self, fewest_steps: int = 1) -> dict[Tensor, Denominator]:
        """sqrt(v_hat) + eps of each parameter whose second moments have seen so many steps, before the next one."""
        return self._of({each: steps for each, steps in self._steps().items() if steps >= fewest_steps})

    def settled(self) -> dict[Tensor, Denominator] | None:
        """Those of parameters that are trained and whose second moments have seen `SETTLED_STEPS` steps.

        One that had its first gradient late, or has one rarely, is left out. None while those that are left are less than
        half of all elements that have second moments.
        """
        begun = {each: steps for each, steps in self._steps().items() if each.requires_grad and steps >= 1}
        settled = {each: steps for each, steps in begun.items() if steps >= SETTLED_STEPS}
        if not settled or 2 * sum(map(Tensor.numel, settled)) < sum(map(Tensor.numel, begun)):
            return None
        return self._of(settled)

    def _of(self, steps: Mapping[Tensor, float]) -> dict[Tensor, Denominator]:
        return {
            parameter: _denominator(self._optimizer.state[parameter], group, steps[parameter])
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter in steps
        }

    def _steps(self) -> dict[Tensor, float]:
        """A capturable or fused optimizer counts on the device: all counts are fetched at once."""
        counts = {parameter: state["step"] for parameter, state in self._optimizer.state.items() if "step" in state}
        away = [count for count in counts.values() if isinstance(count, Tensor) and count.device.type != "cpu"]
        if counts and len(away) == len(counts):
            return dict(zip(counts, torch.stack(away).double().tolist(), strict=True))
        return {parameter: float(count) for parameter, count in counts.items()}


def preconditioner_of(optimizer: Optimizer | None) -> AdamPreconditioner | None:
    """The optimizer's, or None where it has none that is known here: plain is then the metric that fits."""
    return AdamPreconditioner(optimizer) if isinstance(optimizer, Adam | AdamW) else None


def _denominator(state: Mapping[str, Tensor], group: Mapping[str, Any], steps: float) -> Denominator:
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    _, beta = group["betas"]
    return Denominator(second, 1.0 / math.sqrt(1.0 - float(beta) ** steps), float(group["eps"]))
