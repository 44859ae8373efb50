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

from ddp.transport.gradient_squares import Denominator


class AdamPreconditioner:
    """Reads the second moments of torch's Adam and AdamW, fused or not; keeps nothing of its own."""

    def __init__(self, optimizer: Adam | AdamW) -> None:
        self._optimizer = optimizer

    def denominators(self) -> dict[Tensor, Denominator]:
        """sqrt(v_hat) + eps of each parameter, to be used before the optimizer's next step."""
        steps = self._steps()
        return {
            parameter: _denominator(self._optimizer.state[parameter], group, steps[parameter])
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter in steps
        }

    def steps(self) -> int:
        """Steps that the second moments have seen; of the parameter that has the fewest, 0 before the first.

        One that has none after the others' first was never given a gradient: it is not trained, and says nothing.
        """
        return int(min((steps for each, steps in self._steps().items() if each.requires_grad), default=0.0))

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
