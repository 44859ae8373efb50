"""Which example each position of an epoch's order is: the same on all ranks, whatever their number and the batch.

An epoch has as many positions as the training set has examples, and they are dealt out as `ddp.training.data` says. `Uniform`
takes each example once. The others draw with replacement, position by position and independently, so that a step's
gradient is a mean of independent draws from the distribution p, and the noise scale that of this distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ddp.errors import CheckpointError
from ddp.job import SamplingSection
from ddp.training.data import BatchPlan, StepData


class Sampler(Protocol):
    """How a run samples its training set.

    Attributes:
        name: as readers of the run see it.
        replaces: whether draws are with replacement.
        follows_losses: whether an epoch's order is known only when the one before has ended.
    """

    name: str
    replaces: bool
    follows_losses: bool

    def order(self, plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
        """The example at each position of `epoch`, shape (examples,). Collective where it follows losses."""
        ...

    def observe(self, losses: Tensor, data: StepData, index: int) -> None:
        """Take note of the losses of the step's micro-batch `index`, shape (examples,)."""

    def weigh(self, losses: Tensor, data: StepData, index: int) -> Tensor:
        """What the mean over the step is of, shape (examples,)."""
        ...


class Uniform:
    """Each example once an epoch, in an order of its own."""

    name, replaces, follows_losses = "uniform", False, False

    def __init__(self) -> None:
        self._drawn = (-1, np.empty(0, np.int64))

    def order(self, plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
        if self._drawn[0] != epoch:
            self._drawn = (epoch, plan.order(epoch))
        return self._drawn[1]

    def observe(self, losses: Tensor, data: StepData, index: int) -> None:
        """They change nothing."""

    def weigh(self, losses: Tensor, data: StepData, index: int) -> Tensor:
        return losses


class ClassBalanced:
    """Each class equally probable, and each example within its class: p_i = 1 / (classes * examples of i's class).

    Args:
        labels: of each example, shape (examples,).
    """

    name, replaces, follows_losses = "class_balanced", True, False

    def __init__(self, labels: NDArray[np.int64]) -> None:
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self.probabilities = 1.0 / (len(counts) * counts[classes])
        self._drawn = (-1, np.empty(0, np.int64))

    def order(self, plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
        if self._drawn[0] != epoch:
            self._drawn = (epoch, draw(self.probabilities, plan.seed, epoch))
        return self._drawn[1]

    def observe(self, losses: Tensor, data: StepData, index: int) -> None:
        """They change nothing."""

    def weigh(self, losses: Tensor, data: StepData, index: int) -> Tensor:
        return losses


class LossWeighted:
    """Examples by the loss last seen of them: p_i = u/N + (1 - u) w_i / sum w, with u the uniform share.

    w_i is the loss; of an example that was not drawn yet the mean of those that were; where losses are negative all are
    measured from the lowest. An epoch is drawn with what was known at its beginning. With `correct_bias` a loss counts
    1 / (N p_i) times: the mean over a step is then unbiased for the mean over the training set (Katharopoulos and Fleuret
    2018, equation 3), and no weight exceeds 1/u.

    Losses are kept by position in the epoch's order, which one rank trains on: the latest position of an example counts,
    however many ranks there are. `gather` makes them the same on all ranks, in one collective over N numbers, at each
    epoch's end and before a state is saved.
    """

    replaces, follows_losses = True, True

    def __init__(self, examples: int, seed: int, section: SamplingSection) -> None:
        self.name = "loss_weighted, corrected" if section.correct_bias else "loss_weighted"
        self._section, self._seed, self._epoch = section, seed, 0
        self._latest = np.full(examples, np.nan)  # loss of each example, before this epoch; NaN: not drawn yet
        self._here = np.full(examples, -np.inf)  # loss at each position of this epoch; -inf: not seen
        self._drawn: NDArray[np.int64] | None = None
        self.probabilities = np.empty(0)

    def order(self, plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            drawn = self._draw()
            self.gather()
            seen = np.flatnonzero(self._here > -np.inf)
            self._latest[drawn[seen]] = self._here[seen]  # of an example's positions the last one stays
            self._here.fill(-np.inf)
            self._epoch, self._drawn = epoch, None
        return self._draw()

    def observe(self, losses: Tensor, data: StepData, index: int) -> None:
        """One that is not finite tells nothing."""
        if (part := _part(losses, data, index)) is not None:
            values, here = losses.detach().double().cpu().numpy(), self._here[part.start : part.stop]
            here[:] = np.where(np.isfinite(values), values, here)

    def weigh(self, losses: Tensor, data: StepData, index: int) -> Tensor:
        if not self._section.correct_bias or (part := _part(losses, data, index)) is None:
            return losses
        drawn = self._draw()[part.start : part.stop]
        return losses * torch.from_numpy(1.0 / (len(self._latest) * self.probabilities[drawn])).to(losses)

    def gather(self) -> None:
        """Let all ranks know what each has seen in this epoch. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(torch.from_numpy(self._here), dist.ReduceOp.MAX)  # a position is one rank's, -inf elsewhere

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks after `gather`."""
        return {
            "epoch": self._epoch,
            "seed": self._seed,
            "uniform_share": self._section.uniform_share,
            "latest": torch.from_numpy(self._latest.copy()),
            "here": torch.from_numpy(self._here.copy()),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        for name in ("latest", "here"):
            if state[name].shape != self._latest.shape or state[name].dtype != torch.float64:
                raise CheckpointError(f"has losses of {len(state[name])} examples, here are {len(self._latest)}")
        if state["uniform_share"] != self._section.uniform_share:
            raise CheckpointError(
                f"drawn with sampling.uniform_share = {state['uniform_share']}, here {self._section.uniform_share}"
            )
        if type(state["epoch"]) is not int:
            raise CheckpointError(f"its sampling stands in no epoch: {state['epoch']!r}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The epoch that the losses are of stays as it was drawn; the next one is drawn from the run's own seed."""
        self.check_state(state)
        self._epoch, self._drawn = state["epoch"], None
        self._latest = state["latest"].numpy().copy()
        self._here = state["here"].numpy().copy()
        self._draw(state.get("seed", self._seed))

    def _draw(self, seed: int | None = None) -> NDArray[np.int64]:
        if self._drawn is None:
            self.probabilities = mixed(self._latest, self._section.uniform_share)
            self._drawn = draw(self.probabilities, self._seed if seed is None else seed, self._epoch)
        return self._drawn


def _part(losses: Tensor, data: StepData, index: int) -> range | None:
    """Where the examples of a micro-batch are in the epoch's order; None for examples that a tool has put together, and
    for losses that are not one an example, which the trainer refuses."""
    part = data.positions[index] if index < len(data.positions) else None
    return part if part is not None and losses.shape == (len(part),) else None


def mixed(losses: NDArray[np.float64], uniform_share: float) -> NDArray[np.float64]:
    """p as `LossWeighted` has it, shape (examples,); NaN: not known. Uniform where no loss is above the lowest."""
    is_known = np.isfinite(losses)
    largest = np.abs(losses[is_known]).max(initial=0.0)
    if not largest:
        return np.full(len(losses), 1.0 / len(losses))
    scaled = losses / largest  # of which no sum overflows
    known = scaled[is_known]
    weights = np.where(is_known, scaled, known.mean()) - min(known.min(), 0.0)
    total = weights.sum()
    if not total:
        return np.full(len(losses), 1.0 / len(losses))
    return uniform_share / len(losses) + (1 - uniform_share) * weights / total


def draw(probabilities: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """As many independent draws as there are examples, by inversion; a function of its arguments alone."""
    ends = np.cumsum(probabilities)
    uniforms = np.random.default_rng((seed, epoch)).random(len(probabilities))
    return np.searchsorted(ends / ends[-1], uniforms, side="right").astype(np.int64)


def build_sampler(section: SamplingSection, plan: BatchPlan, labels: NDArray[np.int64] | None) -> Sampler:
    """`labels`: of a section that needs them."""
    if section.name == "class_balanced":
        assert labels is not None
        return ClassBalanced(labels)
    if section.name == "loss_weighted":
        return LossWeighted(plan.examples, plan.seed, section)
    return Uniform()
