"""The numbers that forward and backward compute in: autocast, and the loss scale that float16 needs.

The scale is undone where a gradient enters the mean (`Passes`), and the step's row tells everyone of an overflow: unlike
torch's GradScaler, whose rule this is, there is no pass over the gradients for either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ddp.job import PrecisionSection
from ddp.transport.row import StepRow

LARGEST_SCALE = 2.0**60  # its square is a float64 still
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(section: PrecisionSection, device: torch.device) -> AbstractContextManager[Any]:
    """The context that every forward of a job runs in; a new one for each."""
    if section.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[section.dtype])


@dataclass(slots=True)
class LossScale:
    """What the loss is multiplied by before backward; 1 unless the job computes in float16.

    Twice as much after `growth_steps` finite steps in a row, half after one that overflowed (Micikevicius et al. 2018,
    section 3.2; the constants are torch.amp.GradScaler's). All ranks decide from the same rows.
    """

    enabled: bool = False
    value: float = 1.0
    growth_steps: int = 2000
    finite_steps: int = 0  # in a row, since the scale last changed

    @classmethod
    def of(cls, section: PrecisionSection) -> LossScale:
        if section.dtype != "float16":
            return cls()
        return cls(True, section.initial_loss_scale, section.loss_scale_growth_steps)

    def overflowed(self, rows: Sequence[StepRow]) -> bool:
        """Whether the step with these rows is to be passed over because the scale was too large, which it then is less.

        A loss that is not finite itself, or a gradient that overflows unscaled, is not the scale's fault.
        """
        if not self.enabled:
            return False
        if all(row.finite for row in rows) and math.isfinite(rows[0].mean_squared_norm):
            self._grow()
            return False
        if self.value <= 1.0 or not all(math.isfinite(row.loss_sum) for row in rows):
            return False
        self.value, self.finite_steps = self.value / 2, 0
        return True

    def _grow(self) -> None:
        self.finite_steps += 1
        if self.finite_steps >= self.growth_steps:
            self.value, self.finite_steps = min(2 * self.value, LARGEST_SCALE), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing, where the job does not scale its loss."""
        value, finite_steps = float(state["value"]), int(state["finite_steps"])
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"a loss scale of {value}")
        if self.enabled:
            self.value, self.finite_steps = value, finite_steps
