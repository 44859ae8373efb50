"""One run from a job to its summary: builds what the trainer needs, on every rank, and takes it down again.

Whatever can be refused is refused before the first step, by all ranks together, and leaves nothing behind.
"""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddp
from ddp.board import PhaseBoard
from ddp.errors import PeerLostError, UsageError
from ddp.job import Job, run_id_is_given
from ddp.metering.measurement import has_batch_statistics
from ddp.outcome import annotate, clear, clear_launched
from ddp.process_group import initialise, shutdown
from ddp.roll import Roll, open_roll
from ddp.telemetry.critical_batches import read_critical_batches
from ddp.telemetry.records import RunInfo, Sink
from ddp.telemetry.station import Station
from ddp.topology import Topology
from ddp.training.agreement import from_rank_zero, together
from ddp.training.attempt import (
    LOCK_PATIENCE_SECONDS,
    environment_of_the_run,
    note_run,
    refuse_to_diverge_again,
)
from ddp.training.memory import keep_freed_memory
from ddp.training.optimizers import build_optimizer
from ddp.training.plan import Plan, plan_run, size_of
from ddp.training.random_state import seed_rank
from ddp.training.resources import choose_device, open_transport, pinned, refuse_worlds_of_one, threads_per_rank
from ddp.training.resume import Origin, find_origin
from ddp.training.run_directory import RunDirectory, discarded_on_usage_error, open_run_directory
from ddp.training.signals import StopRequest, stop_on_signals
from ddp.training.state import restore_state, save_state
from ddp.training.trainer import Trainer
from ddp.transport.comm_hook import GradientExchange, comm_hook, register

logger = logging.getLogger("ddp.training")


def train(
    job: Job,
    topology: Topology,
    *,
    resume: str | None = None,
    allow_import: bool = False,
    board: PhaseBoard | None = None,
) -> Path:
    """Train `job` as one of its ranks; returns the run directory once every rank is done.

    Args:
        resume: None for a new run; "auto" to go on with the run of this id, if there is one; or the path of
            a run directory or of one checkpoint.
        allow_import: whether a task of the form `module:attr` may be imported.
        board: where this rank says what it is doing; a new one where left out.

    Raises:
        UsageError: the job cannot run here; on all ranks, and nothing is left behind.
        DivergedError, StoppedError, TransportError, CheckpointError: see `ddp.errors`; each carries the
            attributes `step` and `run_directory`.
    """
    device = choose_device(job.run.device, topology)
    refuse_worlds_of_one(job.transport, topology)
    torch.set_num_threads(job.run.threads_per_rank or threads_per_rank(topology))
    if device.type == "cpu":
        keep_freed_memory()
    board = board or PhaseBoard.make(topology.rank)
    board.enter("set-up", 0)
    if topology.restarts and topology.rank == 0 and (before := clear_launched()) is not None:
        logger.info("restart %d; the attempt before ended with %s", topology.restarts, before.message())
    store = initialise(topology, device.type, job.transport.timeout_seconds)
    with stop_on_signals() as stop:
        roll = open_roll(board, store)
        with roll.naming_the_lost(), pinned(job.transport.pin):
            directory = _train(job, topology, device, resume, allow_import, stop, roll)
            shutdown()  # a signal while rank 0 writes the report comes too late to stop anything
    return directory


def _train(
    job: Job,
    topology: Topology,
    device: torch.device,
    resume: str | None,
    allow_import: bool,
    stop: StopRequest,
    roll: Roll,
) -> Path:
    plan = together(lambda: plan_run(job, topology.world_size, allow_import=allow_import))
    transport = together(lambda: open_transport(job.transport, device))
    exchange = GradientExchange(transport)
    with _opened(job, topology, plan, resume, transport.name) as (directory, origin, station), _closing(exchange):
        roll.run_directory = directory.path
        sinks = station.sinks if station else ()
        trainer = build_trainer(job, plan, exchange, device, stop, sinks, directory.checkpoints, roll.board)
        try:
            if origin.checkpoint is not None:
                restore_state(trainer, origin.checkpoint)
            trainer.run()
            roll.board.enter("end", trainer.step_count)
        except BaseException as error:  # the task's own errors too
            annotate(error, step=trainer.step_count)
            raise
        if station is not None:
            _say(station.finish())
        hold(job, stop)
    return directory.path


def _say(text: str) -> None:
    """Print it where that can be done: a closed pipe does not make a finished run fail."""
    try:
        print(text, flush=True)
    except OSError:  # what is left in the buffer would fail again when the interpreter ends
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def _opened(
    job: Job, topology: Topology, plan: Plan, resume: str | None, transport: str
) -> Iterator[tuple[RunDirectory, Origin, Station | None]]:
    """Rank 0's directory and telemetry; the other ranks learn the paths. A usage error leaves nothing."""

    def open_on_rank_zero() -> tuple[RunDirectory, Origin, Station] | None:
        if topology.rank != 0:
            return None
        origin = _origin(job, topology, resume)
        measured = read_critical_batches(job.noise_scale.critical_batch_result)
        station = Station(job.metrics, _run_info(job, topology, plan, origin, transport), measured)
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

    opened = together(open_on_rank_zero)
    if opened is None:
        path, _, source = from_rank_zero("").partition("\n")
        with _naming(Path(path)):
            yield RunDirectory(Path(path)), Origin(job, "", Path(source) if source else None, 0), None
        return
    directory, origin, station = opened
    from_rank_zero(f"{directory.path}\n{origin.checkpoint or ''}")
    try:
        with discarded_on_usage_error(directory), _naming(directory.path):
            try:
                refuse_to_diverge_again(directory.path, topology)
                clear(directory.path)
                station.open(directory.path)
                yield directory, origin, station
            finally:
                station.close()  # before the directory may go
    finally:
        directory.close()


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


def hold(job: Job, stop: StopRequest) -> None:
    """Let the metrics be scraped once more. All ranks stay: those that left would give up waiting for rank 0."""
    until = time.monotonic() + job.metrics.hold_seconds * job.metrics.enabled
    while time.monotonic() < until and not stop.asked:
        time.sleep(0.05)


@contextmanager
def _closing(exchange: GradientExchange) -> Iterator[None]:
    """Leave the exchange, and let the other ranks know at once if this one failed."""
    try:
        yield
    except BaseException as error:
        exchange.transport.close(failed=not isinstance(error, PeerLostError))
        raise
    exchange.transport.close()


def build_trainer(
    job: Job,
    plan: Plan,
    exchange: GradientExchange,
    device: torch.device,
    stop: StopRequest,
    sinks: Sequence[Sink],
    checkpoints: Path,
    board: PhaseBoard,
) -> Trainer:
    """The trainer of a planned run, its model and buckets ready. Collective."""
    exchange.board = board

    def save(trainer: Trainer) -> Path:
        board.enter("save", trainer.step_count)
        return save_state(trainer, checkpoints)

    model = DistributedDataParallel(
        plan.module.to(device),
        **_keep_buffers_apart(),
        gradient_as_bucket_view=True,
    )
    exchange.prepare(model)
    register(model, exchange, comm_hook)
    seed_rank(job.run.seed, exchange.transport.rank)
    model.train()
    return Trainer(
        job=job,
        task=plan.task,
        splits=plan.splits,
        course=plan.course,
        device=device,
        model=model,
        optimizer=build_optimizer(job.optimizer, model.parameters()),
        exchange=exchange,
        stop=stop,
        sinks=sinks,
        save_checkpoint=save,
        board=board,
    )


def _keep_buffers_apart() -> dict[str, Any]:
    """Each rank keeps its running statistics, evaluation averages them. torch 2.13 gave the switch a new name."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


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
        training_examples=plan.batches.examples,
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
        batch_statistics=has_batch_statistics(plan.module),
    )


def _gradient_bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
