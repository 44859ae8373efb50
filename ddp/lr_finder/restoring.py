"""A trainer put back to where it was, bit for bit, whatever was tried out on it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from ddp.telemetry.sinks import Sinks
from ddp.training.judging import Judge
from ddp.training.trainer import Trainer

NO_FILE = Path("the state kept in memory")


@contextmanager
def tried_out(trainer: Trainer) -> Iterator[None]:
    """Steps taken inside leave nothing: no record, nothing observed, and afterwards all that a checkpoint would hold is as it was.

    Those are parameters, buffers, optimizer, generators, position in the data, counters, noise scale and what else has
    registered. Inside, the batch size stays as it is, and a step that is not finite raises a DivergedError
    whatever the job says. Takes the memory of one checkpoint. What a data set or a loss function keeps for itself is not known
    here, and not put back.
    """
    registry = trainer.saving.registry
    shared, own = deepcopy(registry.shared()), deepcopy(registry.own())
    kept = (trainer.sinks, trainer.judge, trainer.course.controller, trainer.course.rate, trainer.course.plan)
    observers, trainer.observers = trainer.observers, []
    groups = [{name: group[name] for name in group if name != "params"} for group in trainer.optimizer.param_groups]
    trainer.sinks, trainer.course.controller = Sinks(), None
    trainer.judge = Judge(trainer.job.faults.model_copy(update={"on_not_finite": "stop"}))
    try:
        yield
    finally:
        trainer.sinks, trainer.judge, trainer.course.controller, trainer.course.rate, trainer.course.plan = kept
        trainer.observers = observers
        trainer.optimizer.zero_grad()
        registry.restore(NO_FILE, shared, own, newcomer=False)
        for group, settings in zip(trainer.optimizer.param_groups, groups, strict=True):
            group.update(settings)  # a restored optimizer has the settings that it had last, its rate among them
