"""Ends a run that no longer gets better, by Keras's rules, and brings its best weights back.

All ranks hold the same evaluation, so they decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddp.errors import CheckpointError
from ddp.job import EarlyStoppingSection
from ddp.tasks.base import Goal


@dataclass
class BestTensors:
    """A copy of some of a model's tensors as they were at its best; none before an evaluation.

    Args:
        source: the model's own, by name: its parameters, which are the same on all ranks, or its buffers, which are not.
    """

    source: Callable[[], Mapping[str, Tensor]]
    kept: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def keep(self) -> None:
        """As they are now."""
        present = self.source()
        self.kept = self.kept or {name: torch.empty_like(tensor) for name, tensor in present.items()}
        for name, tensor in present.items():
            self.kept[name].copy_(tensor)

    @torch.no_grad()
    def bring_back(self) -> None:
        """Nothing, where there was no evaluation."""
        for name, tensor in self.source().items() if self.kept else ():
            tensor.copy_(self.kept[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        present = self.source()
        if state and {name: each.shape for name, each in state.items()} != {n: t.shape for n, t in present.items()}:
            raise CheckpointError("the best weights kept for early stopping are those of another model")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.kept = dict(state)


@dataclass
class EarlyStopping:
    """What has been the best so far. `parameters` and `buffers`, where kept, are states of their own in a checkpoint."""

    section: EarlyStoppingSection
    goal: Goal  # of what is monitored
    parameters: BestTensors | None = None
    buffers: BestTensors | None = None
    best: float = math.nan
    best_step: int = -1
    seen: int = 0  # evaluations; the run's first stops nothing
    waited: int = 0  # evaluations since the best one
    stopped: bool = False
    restored: bool = False  # the weights are the best ones now
    last_step: int = -1  # of the last evaluation that was taken

    @classmethod
    def of(cls, section: EarlyStoppingSection, goal: Goal, module: nn.Module) -> EarlyStopping | None:
        """None where the job does not stop early."""
        if not section.enabled:
            return None
        if not section.restore_best_weights:
            return cls(section, goal)
        parameters = BestTensors(lambda: {name: each.detach() for name, each in module.named_parameters()})
        return cls(section, goal, parameters, BestTensors(lambda: dict(module.named_buffers())))

    def observe(self, step: int, epoch: float, value: float, *, due: bool = True) -> bool:
        """Take in an evaluation of the weights as they are; whether it is the best so far. `stopped` says whether it was the last.

        An improvement is more than `min_delta` beyond the best, and beyond the baseline where there is one; without it
        nothing counts as a wait before `start_from_epoch`. A value that is not a number is no improvement. An evaluation
        that is made again, where a run goes on from there in another directory, counts once; one that only the run's end
        has brought, and that is not `due`, counts where it is the best.
        """
        if step <= self.last_step:
            return False
        self.restored = self.stopped = False
        if not due and not self._is_better(value, self.best):
            return False
        self.seen, self.last_step = self.seen + 1, step
        if epoch < self.section.start_from_epoch:
            return False
        is_best = self._is_better(value, self.best) or (math.isnan(self.best) and not math.isnan(value))
        if is_best:
            self.best, self.best_step = value, step
            for each in self._tensors:
                each.keep()
        if is_best and (self.section.baseline is None or self._is_better(value, self.section.baseline)):
            self.waited = 0
            return True
        self.waited += 1
        self.stopped = self.seen > 1 and self._has_waited
        return is_best

    def restore(self, step: int) -> bool:
        """Bring the best weights back after the last step; whether they are others than those that were there."""
        if not self._tensors or self.restored or self.best_step in (-1, step):
            return False
        for each in self._tensors:
            each.bring_back()
        self.restored = True
        return True

    @property
    def _tensors(self) -> list[BestTensors]:
        return [each for each in (self.parameters, self.buffers) if each is not None]

    @property
    def _has_waited(self) -> bool:
        return self.section.patience is not None and self.waited >= max(1, self.section.patience)

    def _is_better(self, value: float, than: float) -> bool:
        sign = 1.0 if self.goal == "max" else -1.0
        return sign * value - self.section.min_delta > sign * than

    def in_words(self, step: int) -> str:
        """Why the run ended after `step`."""
        return (
            f"stopped early: validation {self.section.monitor} has not improved for {self.waited} evaluation(s), up to step "
            f"{step}; the best was {self.best:.6g} at step {self.best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "best_step", "seen", "waited", "stopped", "restored", "last_step")
        return {"monitor": self.section.monitor, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another metric; with more patience than the run was stopped by, it goes on."""
        best, best_step, waited = float(state["best"]), int(state["best_step"]), int(state["waited"])
        if state["monitor"] == self.section.monitor:
            self.best, self.best_step, self.waited = best, best_step, waited
            self.seen, self.restored = int(state["seen"]), bool(state["restored"])
            self.last_step = int(state.get("last_step", -1))
            self.stopped = bool(state["stopped"]) and self._has_waited
