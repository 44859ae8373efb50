"""What a run keeps open while it lasts: its directory, and on rank 0 what it tells the outside."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

import ddp
from ddp.errors import UsageError
from ddp.job import Job, TrackersSection, run_id_is_given
from ddp.metering.measurement import has_batch_statistics
from ddp.outcome import annotate, clear
from ddp.telemetry.critical_batches import read_critical_batches
from ddp.telemetry.records import RunInfo
from ddp.telemetry.station import Station
from ddp.topology import Topology
from ddp.training.agreement import from_rank_zero, together
from ddp.training.attempt import (
    LOCK_PATIENCE_SECONDS,
    environment_of_the_run,
    note_run,
    refuse_to_diverge_again,
)
from ddp.training.plan import Plan, size_of
from ddp.training.resume import Origin, find_origin
from ddp.training.run_directory import RunDirectory, discarded_on_usage_error, flat, open_run_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """`station` is rank 0's alone."""

    directory: RunDirectory
    origin: Origin
    station: Station | None = None


@contextmanager
def opened(job: Job, topology: Topology, plan: Plan, resume: str | None, transport: str) -> Iterator[Opened]:
    """Rank 0's directory and telemetry; the other ranks learn the paths. A usage error leaves nothing."""

    def open_on_rank_zero() -> tuple[RunDirectory, Origin, Station] | None:
        if topology.rank != 0:
            return None
        origin = _origin(job, topology, resume)
        measured = read_critical_batches(job.noise_scale.critical_batch_result)
        info = _run_info(job, topology, plan, origin, transport)
        warns = job.watching.enabled and job.watching.warnings
        station = Station(
            job.metrics,
            info,
            measured,
            _trackers(job),
            flat(job.model_dump(mode="json", exclude_none=True)),
            warns=warns,
        )
        try:
            directory = open_run_directory(
                origin.job,
                origin.run_id,
                resume=resume is not None or topology.restarts > 0,
                patience_seconds=LOCK_PATIENCE_SECONDS if topology.restarts else 0.0,
            )
        except UsageError:
            station.close()
            raise
        note_run(origin.run_id, os.environ)
        return directory, origin, station

    found = together(open_on_rank_zero)
    if found is None:
        path, _, source = from_rank_zero("").partition("\n")
        with _naming(Path(path)):
            yield Opened(RunDirectory(Path(path)), Origin(job, "", Path(source) if source else None, 0))
        return
    directory, origin, station = found
    from_rank_zero(f"{directory.path}\n{origin.checkpoint or ''}")
    try:
        with discarded_on_usage_error(directory), _naming(directory.path):
            try:
                refuse_to_diverge_again(directory.path, topology)
                clear(directory.path)
                station.open(directory.path)
                _say_where_it_begins(directory, origin)
                yield Opened(directory, origin, station)
            finally:
                station.close()  # before the directory may go
    finally:
        directory.close()


def _say_where_it_begins(directory: RunDirectory, origin: Origin) -> None:
    """A new run says nothing."""
    if origin.checkpoint is not None:
        logger.info("goes on from step %d, from %s", origin.step, origin.checkpoint)
    elif directory.reopened:
        logger.info("%s has no checkpoint: the run begins at its first step again", directory.path)


def _origin(job: Job, topology: Topology, resume: str | None) -> Origin:
    """Where this attempt starts: from what an earlier one saved, which is newer than what the user named, if anything."""
    environ = environment_of_the_run(job, topology, os.environ)
    arguments = (datetime.now(UTC), secrets.token_hex(2))
    if topology.restarts and run_id_is_given(job.run.id, environ):
        origin = find_origin(job, environ, "auto", *arguments)
        if origin.checkpoint is not None or resume is None:
            return origin
    return find_origin(job, environ, resume, *arguments)


@contextmanager
def _naming(run_directory: Path) -> Iterator[None]:
    """An error from here on says which run it ended."""
    try:
        yield
    except BaseException as error:
        annotate(error, run_directory=run_directory)
        raise


def _run_info(job: Job, topology: Topology, plan: Plan, origin: Origin, transport: str) -> RunInfo:
    length = plan.course.length
    return RunInfo(
        run_id=origin.run_id,
        task=job.task.name,
        optimizer=job.optimizer.name,
        transport=transport,
        version=ddp.__version__,
        world_size=topology.world_size,
        global_batch_size=plan.batches.global_batch_size,
        micro_batch_size=plan.batches.micro_batch_size,
        training_examples=0 if plan.batches.is_open else plan.batches.examples,
        validation_examples=size_of(plan.splits.validation),
        steps=length.steps,
        steps_per_epoch=length.steps_per_epoch,
        epochs=length.epochs,
        metric=job.evaluation.metric,
        target=job.evaluation.target,
        start_step=origin.step,
        restarts=topology.restarts,
        goal=plan.goal,
        nodes=topology.world_size // topology.local_world_size,
        gradient_bytes=_gradient_bytes(plan.module),
        learning_rate_rule=job.optimizer.learning_rate_rule,
        sampling=plan.course.sampling,
        batch_statistics=has_batch_statistics(plan.module),
    )


def _trackers(job: Job) -> TrackersSection:
    """With no more patience than the other ranks have, which wait for rank 0 at the end."""
    patience = min(job.trackers.patience_seconds, job.transport.timeout_seconds / 2)
    return job.trackers.model_copy(update={"patience_seconds": patience})


def _gradient_bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
