"""What becomes of a step whose loss or gradient is not finite: decided from everyone's rows, so alike on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from ddp.errors import DivergedError
from ddp.job import FaultsSection
from ddp.outcome import annotate
from ddp.transport.row import StepRow


class Verdict(Enum):
    """On one step."""

    TAKE = auto()
    SKIP = auto()  # as if its examples had not been there
    ROLL_BACK = auto()  # to the newest checkpoint


@dataclass
class Judge:
    """The policy of a run's [faults] table.

    Rolling back helps where a number went wrong by itself: a step that is not finite again when it comes again is passed
    over instead, since its data or the weights are at fault.
    """

    section: FaultsSection
    skipped_in_a_row: int = 0
    roll_backs: int = 0
    reason: str = ""  # of the last verdict that was not to take the step
    rank: int = -1  # that was at fault then; -1 for several or none
    step: int = -1  # which one it was
    _rolled_back_for: set[int] = field(default_factory=set)  # steps

    def state_dict(self) -> dict[str, Any]:
        """The counts that caps are held against."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "roll_backs": self.roll_backs,
            "rolled_back_for": sorted(self._rolled_back_for),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped_in_a_row, self.roll_backs = int(state["skipped_in_a_row"]), int(state["roll_backs"])
        self._rolled_back_for = {int(step) for step in state["rolled_back_for"]}

    def judge(self, rows: Sequence[StepRow], step: int, epoch: float) -> Verdict:
        """The verdict on `step`.

        Raises:
            DivergedError: it is not finite, and the run is to stop.
        """
        bad = [rank for rank, row in enumerate(rows) if not row.finite]
        if not bad and math.isfinite(rows[0].mean_squared_norm):
            self.skipped_in_a_row = 0
            return Verdict.TAKE
        self.rank, self.step = bad[0] if len(bad) == 1 else -1, step
        self.reason = (
            f"the loss or the gradient is not finite on rank {', '.join(map(str, bad))} in step {step} (epoch {epoch:.2f})"
            if bad
            else f"the averaged gradient overflows in step {step} (epoch {epoch:.2f})"
        )
        if self.section.on_not_finite == "roll_back" and step not in self._rolled_back_for:
            return self._roll_back(step)
        if self.section.on_not_finite == "stop":
            raise self.diverged()
        return self.skip()

    def diverged(self, why: str = "") -> DivergedError:
        """The error that ends the run for the last reason."""
        error = DivergedError(
            f"{self.reason}{why}: lower optimizer.learning_rate, add schedule.warmup_steps or "
            "optimizer.gradient_clip_norm, or look for bad values in the data"
        )
        annotate(error, step=self.step)
        return error

    def skip(self) -> Verdict:
        """The verdict where there is nothing to go back to, too.

        Raises:
            DivergedError: so many in a row are too many.
        """
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.section.max_skipped_steps:
            raise self.diverged(f", after {self.section.max_skipped_steps} steps in a row (faults.max_skipped_steps)")
        return Verdict.SKIP

    def _roll_back(self, step: int) -> Verdict:
        self._rolled_back_for.add(step)
        self.roll_backs += 1
        if self.roll_backs > self.section.max_roll_backs:
            raise self.diverged(f", after {self.section.max_roll_backs} roll-backs (faults.max_roll_backs)")
        return Verdict.ROLL_BACK


class BuffersBefore:
    """A copy of a model's buffers: the forward of a step that is passed over has spoilt them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[str, Tensor] = {}

    def keep(self) -> None:
        """Before the first forward of a step."""
        buffers = dict(self._module.named_buffers())
        if not all(_alike(self._copies.get(name), buffer) for name, buffer in buffers.items()):
            self._copies = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
        _copy_all([self._copies[name] for name in buffers], list(buffers.values()))

    def bring_back(self) -> None:
        """Into whatever tensors are the buffers now: a forward may have assigned others."""
        buffers = {name: buffer for name, buffer in self._module.named_buffers() if name in self._copies}
        _copy_all(list(buffers.values()), [self._copies[name] for name in buffers])


def _alike(copy: Tensor | None, buffer: Tensor) -> bool:
    return copy is not None and (copy.shape, copy.dtype, copy.device) == (buffer.shape, buffer.dtype, buffer.device)


def _copy_all(into: list[Tensor], values: list[Tensor]) -> None:
    if into:
        with torch.no_grad():
            torch._foreach_copy_(into, values)
