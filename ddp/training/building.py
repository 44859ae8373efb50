"""From a plan to a trainer that can take its first step."""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp.board import PhaseBoard
from ddp.errors import UsageError
from ddp.job import Job
from ddp.telemetry.sinks import Sinks
from ddp.training.activation_checkpointing import checkpoint_activations
from ddp.training.agreement import together
from ddp.training.averaged_weights import AveragedWeights
from ddp.training.early_stopping import EarlyStopping
from ddp.training.initialisation import freeze_, load_weights_
from ddp.training.loader import Loader
from ddp.training.optimizers import build_optimizer
from ddp.training.plan import Plan
from ddp.training.random_state import seed_rank
from ddp.training.registry import Registry
from ddp.training.saving import Saving
from ddp.training.signals import StopRequest
from ddp.training.state import register_state
from ddp.training.sync_batch_norm import synchronised
from ddp.training.trainer import Trainer
from ddp.transport.comm_hook import GradientExchange, comm_hook, register


def build_trainer(
    job: Job,
    plan: Plan,
    exchange: GradientExchange,
    device: torch.device,
    stop: StopRequest,
    *,
    sinks: Sinks,
    checkpoints: Path,
    board: PhaseBoard,
    loader: Loader | None = None,
    fresh: bool = True,
) -> Trainer:
    """The trainer of a planned run, its model and buckets ready. Collective.

    Args:
        fresh: whether weights come from the job's initialisation.file; not where a checkpoint's follow, for which it is not
            needed any more.
    """
    exchange.board = board
    if fresh:
        together(lambda: load_weights_(plan.module, job.initialisation))
    module = _prepared(job, plan.module.to(device), device)
    freeze_(module, job.initialisation.freeze)  # normalisation layers may be others now
    optimizer = together(lambda: build_optimizer(job.optimizer, module.named_parameters()))
    averaged = AveragedWeights(job.averaged_weights, module) if job.averaged_weights.enabled else None
    if job.precision.compile:
        compile_(module, device)
    model = DistributedDataParallel(
        module,
        **_keep_buffers_apart(),
        gradient_as_bucket_view=True,
    )
    exchange.prepare(model)
    register(model, exchange, comm_hook)
    seed_rank(job.run.seed, exchange.transport.rank)
    model.train()
    freeze_(module, job.initialisation.freeze)  # normalisation layers of frozen parts stay out of training
    registry = Registry()
    saving = Saving(
        *(checkpoints, job.checkpoint, registry),
        metric=job.evaluation.metric,
        goal=plan.goal,
        rank=exchange.transport.rank,
        world_size=exchange.transport.world_size,
    )
    trainer = Trainer(
        job=job,
        task=plan.task,
        splits=plan.splits,
        course=plan.course,
        device=device,
        model=model,
        optimizer=optimizer,
        exchange=exchange,
        saving=saving,
        stop=stop,
        sinks=sinks,
        loader=loader,
        board=board,
        averaged=averaged,
        early_stopping=EarlyStopping.of(job.early_stopping, plan.stopping_goal, module),
    )
    register_state(trainer, registry)
    return trainer


def _prepared(job: Job, module: nn.Module, device: torch.device) -> nn.Module:
    """As the job wants it beyond what the task made."""
    if job.normalisation.sync_batch_norm:
        module = synchronised(module, device, job.transport.timeout_seconds)
    if job.precision.activation_checkpointing:
        checkpoint_activations(module, job.precision.activation_checkpointing, compiled=job.precision.compile)
    return module


def compile_(module: nn.Module, device: torch.device) -> None:
    """In place, so that names stay as they are; the code is made in the first forward.

    Raises:
        UsageError: there is no compiler that torch could use.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UsageError("precision.compile: torch.compile needs a C++ compiler on CPU, and there is no g++ or clang++")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of parts of it that it loads now
        module.compile()


def _keep_buffers_apart() -> dict[str, Any]:
    """Each rank keeps its running statistics, evaluation averages them. torch 2.13 gave the switch a new name."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
