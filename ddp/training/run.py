"""One run from a job to its summary: builds what the trainer needs, on every rank, and takes it down again.

Whatever can be refused is refused before the first step, by all ranks together, and leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ddp.board import PhaseBoard
from ddp.checkpoint import check_space
from ddp.job import Job, check_exposure, redact
from ddp.outcome import annotate, clear_launched
from ddp.telemetry.sinks import Sinks
from ddp.topology import Topology
from ddp.training.agreement import together
from ddp.training.building import build_trainer
from ddp.training.loader import Loader, opened_loader
from ddp.training.loop import Loop
from ddp.training.opening import Opened, opened
from ddp.training.parameter_table import ParameterTable
from ddp.training.place import Place, opened_exchange, opened_place
from ddp.training.plan import Plan, plan_run
from ddp.training.signals import StopRequest
from ddp.training.state import expected_bytes
from ddp.training.trainer import Trainer
from ddp.training.watching import LayerWatch
from ddp.transport.comm_hook import GradientExchange

logger = logging.getLogger("ddp.training")


def train(
    job: Job,
    topology: Topology,
    *,
    resume: str | None = None,
    allow_import: Sequence[str] = (),
    insecure: bool = False,
    board: PhaseBoard | None = None,
) -> Path:
    """Train `job` as one of its ranks; returns the run directory once every rank is done.

    Args:
        resume: None for a new run; "auto" to go on with the run of this id, if there is one; or the path of
            a run directory or of one checkpoint.
        allow_import: modules from which, and from below which, a task of the form `module:attr` may be imported.
        insecure: whether metrics may be served to other machines without TLS.
        board: where this rank says what it is doing; a new one where left out.

    Raises:
        UsageError: the job cannot run here; on all ranks, and nothing is left behind.
        DivergedError, StoppedError, TransportError, CheckpointError: see `ddp.errors`; each carries the
            attributes `step` and `run_directory`.
    """
    check_exposure(job.metrics, insecure=insecure)
    if topology.restarts and topology.rank == 0 and (before := clear_launched()) is not None:
        logger.info("restart %d; the attempt before ended with %s", topology.restarts, before.message())
    with opened_place(job, topology, board) as place:
        return train_in(place, resume, allow_import)


def train_in(place: Place, resume: str | None, allow_import: Sequence[str]) -> Path:
    """Train the place's job in it; returns the run directory. Collective."""
    job, topology = place.job, place.topology
    plan = together(lambda: plan_run(job, topology.world_size, topology.rank, allow_import=allow_import))
    with (
        opened_loader(
            job.data, plan.splits.training, plan.batches, topology.rank, place.cores, plan.course.sampler
        ) as loader,
        opened_exchange(place) as exchange,
        opened(job, topology, plan, resume, exchange.transport.name) as run,
    ):
        place.roll.run_directory = run.directory.path
        _train_opened(place, plan, exchange, run, loader)
        if run.station is not None:
            _say(redact(run.station.finish()))
        hold(job, place.stop)
    return run.directory.path


def _train_opened(place: Place, plan: Plan, exchange: GradientExchange, run: Opened, loader: Loader | None) -> None:
    trainer = build_trainer(
        *(place.job, plan, exchange, place.device, place.stop),
        sinks=run.station.sinks if run.station is not None else Sinks(),
        checkpoints=run.directory.checkpoints,
        board=place.roll.board,
        loader=loader,
        fresh=run.origin.checkpoint is None,
    )
    trainer.observers.append(ParameterTable(place.job.record, trainer.model.module))
    if run.station is not None:
        trainer.saving.registry.add("goodput", run.station.goodput)
        if run.station.warner is not None:
            trainer.saving.registry.add("warnings", run.station.warner)
    if place.job.watching.enabled:
        trainer.observers.append(_layer_watch(trainer))
    together(lambda: _check_saving(trainer, run))
    try:
        trainer.settle()
        if run.origin.checkpoint is not None:
            trainer.saving.restore(run.origin.checkpoint)
            _say_if_it_rounds_otherwise(trainer)
        Loop(trainer).run()
        if loader is not None:
            loader.close()  # before the report, and while the metrics are held
    except BaseException as error:  # the task's own errors too
        annotate(error, step=trainer.step_count)
        raise
    finally:
        trainer.saving.close()


def _layer_watch(trainer: Trainer) -> LayerWatch:
    return LayerWatch(
        trainer.job.watching,
        trainer.model,
        rank=trainer.rank,
        world_size=trainer.world_size,
        device=trainer.device,
    )


def _say_if_it_rounds_otherwise(trainer: Trainer) -> None:
    """gloo and NCCL choose the order of additions themselves; every other transport adds in rank order."""
    if trainer.rank == 0 and trainer.exchange.transport.name == "c10d" and trainer.world_size > 2:
        logger.info(
            "c10d adds the gradients of %d ranks in an order of its own: the resumed run is the one that never stopped to "
            "some 1e-6, not bit for bit; other transports give the same bits",
            trainer.world_size,
        )


def _check_saving(trainer: Trainer, run: Opened) -> None:
    trainer.saving.check()
    if trainer.rank == 0:
        check_space(run.directory.checkpoints, expected_bytes(trainer))


def _say(text: str) -> None:
    """Print it where that can be done: a closed pipe does not make a finished run fail."""
    try:
        print(redact(text), flush=True)
    except OSError:  # what is left in the buffer would fail again when the interpreter ends
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def hold(job: Job, stop: StopRequest) -> None:
    """Let the metrics be scraped once more. All ranks stay: those that left would give up waiting for rank 0."""
    until = time.monotonic() + job.metrics.hold_seconds * job.metrics.enabled
    while time.monotonic() < until and not stop.asked:
        time.sleep(0.05)
