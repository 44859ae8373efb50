"""What of a trainer goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp import checkpoint
from ddp.errors import CheckpointError
from ddp.noise.tracker import NoiseScaleTracker
from ddp.training.agreement import together
from ddp.training.course import Course
from ddp.training.random_state import random_state, restore_random_state
from ddp.training.trainer import Trainer

logger = logging.getLogger("ddp.training")
_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)


def save_state(trainer: Trainer, directory: Path) -> Path:
    """Write the trainer's state as the checkpoint of its step, and return where. All ranks together."""
    module = trainer.model.module
    saver = checkpoint.Saver(
        directory, rank=trainer.rank, world_size=trainer.world_size, keep=trainer.job.checkpoint.keep
    )
    saver.begin(
        trainer.step_count,
        shared={
            "parameters": {name: parameter.detach() for name, parameter in module.named_parameters()},
            "optimizer": trainer.optimizer.state_dict(),
            "noise_scale": None if trainer.watch.tracker is None else trainer.watch.tracker.state_dict(),
            "course": trainer.course.state_dict(),
            "step": trainer.step_count,
            "examples_total": trainer.examples_total,
            "training_examples": trainer.plan.examples,
            "state_dict": _state_dict_names(module),
        },
        own={"buffers": dict(module.named_buffers()), "random": random_state()},
    )
    try:
        return saver.finish(_gather)
    finally:
        saver.close()


def _state_dict_names(module: nn.Module) -> dict[str, str]:
    """For whoever exports the model: what its own state_dict has, tied weights twice, and what each is saved as."""
    saved = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    state = module.state_dict(keep_vars=True)
    return {name: saved[id(tensor)] for name, tensor in state.items() if id(tensor) in saved}


def _gather(mine: int) -> list[int]:
    everyones = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, torch.tensor([mine]))
    return [int(each) for each in everyones]


def restore_state(trainer: Trainer, path: Path) -> None:
    """Continue where the checkpoint at `path` stands, written by any number of ranks. All ranks together.

    The same examples follow in the same global batches. With another number of ranks rank r takes over the running
    statistics of rank r modulo the old number, ranks that are new keep the generators they were seeded with, and sums
    are rounded otherwise: it is not the same run bit for bit.

    Raises:
        CheckpointError: it cannot be read, or belongs to another model or other data; nothing is changed then.
    """
    module = trainer.model.module
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def load() -> tuple[dict[str, Any], dict[str, Any]]:
        shared, own = checkpoint.load(path, trainer.rank)
        # A fused optimizer would read a moment of another shape beyond its end, and copy_ would broadcast.
        _check_same(path, "parameter", shared["parameters"], parameters)
        _check_same(path, "buffer", own["buffers"], buffers)
        if shared["training_examples"] != trainer.plan.examples:
            raise CheckpointError(
                f"{path}: written while training on {shared['training_examples']:,} examples, the training set now has "
                f"{trainer.plan.examples:,}; start a new run, or bring the data back"
            )
        _load_readings(path, deepcopy(trainer.watch.tracker), shared["noise_scale"])
        _load_course(path, deepcopy(trainer.course), shared["course"])
        return shared, own

    shared, own = together(load)
    _load_optimizer(path, trainer.optimizer, shared["optimizer"])  # changes nothing where it fails, which all ranks do
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(shared["parameters"][name])
        for name, tensor in buffers.items():
            tensor.copy_(own["buffers"][name])
    _load_readings(path, trainer.watch.tracker, shared["noise_scale"])
    _load_course(path, trainer.course, shared["course"])
    trainer.step_count, trainer.examples_total = shared["step"], shared["examples_total"]
    written_by = checkpoint.read_manifest(path).world_size
    if trainer.rank < written_by:
        restore_random_state(own["random"])
    if trainer.rank == 0 and written_by != trainer.world_size:
        logger.warning(
            "%s was written by %d rank(s) and goes on with %d: the same examples in the same batches, but rounding, random "
            "numbers and running statistics differ, so that it is not bit for bit the run that it would have been",
            path,
            written_by,
            trainer.world_size,
        )


def _load_readings(path: Path, tracker: NoiseScaleTracker | None, state: Mapping[str, Any] | None) -> None:
    """Nothing where the noise scale is off now, or was then."""
    if tracker is None or state is None:
        return
    try:
        tracker.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: {error}; start a new run, or resume without it, --set noise_scale.enabled=false"
        ) from error


def _load_course(path: Path, course: Course, state: Mapping[str, Any]) -> None:
    try:
        course.load_state_dict(state)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: where the run stood cannot be read: {error!r}; start a new run, or resume an earlier checkpoint"
        ) from error


def _load_optimizer(path: Path, optimizer: Optimizer, state: dict[str, Any]) -> None:
    try:
        optimizer.load_state_dict(state)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: belongs to another optimizer: {error}; start a new run, or bring the optimizer back"
        ) from error


def _check_same(path: Path, kind: str, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    for name in [*saved, *present]:
        old, new = saved.get(name), present.get(name)
        if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
            raise CheckpointError(
                f"{path}: belongs to another model: {kind} {name} is {_describe(old)} there and {_describe(new)} here; "
                "start a new run, or bring the model back"
            )


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
