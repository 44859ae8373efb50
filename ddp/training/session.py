"""A model on all ranks without a run: what looks into training, or tries something out, works in one.

    with session(job, topology) as here:
        steps = here.steps()
        rows = here.trainer.step(steps)

The step is the trainer's own; nothing is recorded, served or saved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ddp.board import PhaseBoard
from ddp.job import Job
from ddp.telemetry.sinks import Sinks
from ddp.topology import Topology
from ddp.training.agreement import together
from ddp.training.building import build_trainer
from ddp.training.data import StepData
from ddp.training.place import Place, opened_exchange, opened_place
from ddp.training.plan import Plan, plan_run
from ddp.training.signals import StopRequest
from ddp.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Session:
    """One rank's part of a model that is ready to take its first step."""

    job: Job
    place: Place
    plan: Plan
    trainer: Trainer

    @property
    def topology(self) -> Topology:
        return self.place.topology

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def stop(self) -> StopRequest:
        return self.place.stop

    @property
    def rank(self) -> int:
        return self.place.topology.rank

    @property
    def world_size(self) -> int:
        return self.place.topology.world_size

    def steps(self) -> Iterator[StepData]:
        """The batches that the trainer takes, from where its course stands, without end."""
        trainer = self.trainer
        return trainer.course.batches(
            trainer.splits.training,
            trainer.rank,
            lambda ahead: trainer.watch.least_parts(trainer.step_count + 1 + ahead),
        )


@contextmanager
def session(
    job: Job, topology: Topology, *, allow_import: Sequence[str] = (), board: PhaseBoard | None = None
) -> Iterator[Session]:
    """A place, and a model in it. Collective.

    Raises:
        UsageError: the job cannot run here; on all ranks.
    """
    with opened_place(job, topology, board) as place, prepared(place, job, allow_import=allow_import) as here:
        yield here


@contextmanager
def prepared(place: Place, job: Job, *, allow_import: Sequence[str] = ()) -> Iterator[Session]:
    """A model of `job`, which may differ from the place's own in all that is not the machine's. Several may follow. Collective."""
    plan = together(lambda: plan_run(job, place.topology.world_size, place.topology.rank, allow_import=allow_import))
    with opened_exchange(place) as exchange, tempfile.TemporaryDirectory(prefix="ddp-") as nowhere:
        trainer = build_trainer(
            *(job, plan, exchange, place.device, place.stop),
            sinks=Sinks(),
            checkpoints=Path(nowhere),
            board=place.roll.board,
        )
        try:
            trainer.settle()
            yield Session(job, place, plan, trainer)
        finally:
            trainer.saving.close()
