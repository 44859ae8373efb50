"""Members and their ensemble on one data set, in one pass: the data are fetched once, and each member computes once.

That pass is training's own evaluation of a task whose metrics are everyone's: each example counts once whatever the number
of ranks, and sums are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp.ensemble.combining import Ensemble
from ddp.errors import StoppedError, UsageError
from ddp.tasks.base import Batch, Goal, Task, loss_and_metrics_of
from ddp.training.evaluation import evaluate
from ddp.training.place import Place


@dataclass(frozen=True, slots=True)
class Measured:
    """The means over the examples of one data set."""

    loss: float
    metrics: Mapping[str, float]


class Joint:
    """The ensemble's loss and metrics under their own names, each member's with its number before."""

    def __init__(self, task: Task, ensemble: Ensemble) -> None:
        self._task, self._count = task, len(ensemble.members)
        names: dict[str, Goal] = {**task.goals, "loss": "min"}
        self.goals: Mapping[str, Goal] = {
            **task.goals,
            **{f"{member}/{name}": goal for member in range(self._count) for name, goal in names.items()},
        }

    def loss_and_metrics(self, model: Ensemble, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        values: dict[str, Tensor] = {}
        with model.remembering():
            for number, member in enumerate(model.members):
                losses, metrics = _values(self._task, member, batch)
                values |= {f"{number}/{name}": each for name, each in {**metrics, "loss": losses}.items()}
            losses, metrics = self._of_ensemble(model, batch)
        return losses, {**values, **metrics}

    def _of_ensemble(self, model: Ensemble, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Members gave values just now, so that what fails is what the task does with a model that is several."""
        try:
            return _values(self._task, model, batch)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as fault:
            raise UsageError(
                f"ensemble: the task's loss or metrics look at more of a model than its outputs ({type(fault).__name__}: "
                f"{fault}); an ensemble has nothing else"
            ) from None

    def measured(self, found: Mapping[str, float], loss: float) -> tuple[list[Measured], Measured]:
        """Means by name to those of each member, and of the ensemble."""
        members = [
            Measured(found[f"{number}/loss"], {name: found[f"{number}/{name}"] for name in self._task.goals})
            for number in range(self._count)
        ]
        return members, Measured(loss, {name: found[name] for name in self._task.goals})


def measure(
    place: Place, task: Task, ensemble: Ensemble, dataset: Dataset[Any], batch_size: int
) -> tuple[list[Measured], Measured]:
    """Each member and the ensemble. Collective.

    Raises:
        StoppedError: a rank was asked to stop; on all of them.
        UsageError: the task cannot be computed of an ensemble.
    """
    joint: Any = Joint(task, ensemble)
    found = evaluate(
        joint,
        ensemble,
        dataset,
        rank=place.topology.rank,
        world_size=place.topology.world_size,
        batch_size=batch_size,
        device=place.device,
        asked_to_stop=lambda: place.stop.asked,
    )
    if found is None:
        raise StoppedError("ensemble: stopped by a signal: run it again")
    return joint.measured(found.metrics, found.loss)


def _values(task: Task, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    both = loss_and_metrics_of(task)
    return both(model, batch) if both is not None else (task.loss(model, batch), task.metrics(model, batch))
