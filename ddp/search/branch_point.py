"""Where branched trials begin: a training run's checkpoint, read for its model, its optimizer and what it was run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddp import checkpoint
from ddp.errors import UsageError
from ddp.job import load_job
from ddp.search.sweep_file import Sweep

if TYPE_CHECKING:
    from ddp.search.training_step import TrainingStep


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """A run at one of its steps.

    Attributes:
        origin: the checkpoint's directory.
        step: optimizer steps that the run had taken.
        batch_size: its global batch size then, in examples.
        learning_rate: of its last step.
    """

    origin: str
    step: int
    batch_size: int
    learning_rate: float


def read_branch_point(path: Path, sweep: Sweep) -> BranchPoint:
    """Read the checkpoint at `path`, `RUN_DIR/checkpoints/step-...`, and its run's job file.

    Raises:
        CheckpointError: it cannot be read.
        JobFileError: the run's job file cannot be read.
        UsageError: the run's task or optimizer is not the sweep's, or its learning rate had come down to 0.
    """
    path = checkpoint.resolve(path.resolve())
    manifest = checkpoint.verify(path)
    job = load_job(path.parent.parent / "job.toml")
    for table in ("task", "optimizer"):
        here, there = (getattr(each, table).name for each in (sweep.job, job))
        if here != there:
            raise UsageError(f"{path}: a run of {table} {there}, and the sweep file has {table}.name = {here!r}")
    shared = checkpoint.load_shared(path)
    adapted = shared["course"]["batch"]
    group = shared["optimizer"]["param_groups"][0]
    rate = float(group["lr"]) / float(group.get("learning_rate_factor", 1.0))
    if not rate > 0:
        raise UsageError(
            f"{path}: the run's learning rate is {rate:g} here, its schedule is over: branches cannot go on from it; give "
            'an earlier checkpoint (checkpoint.every_steps saves some), or train with schedule.name = "constant"'
        )
    return BranchPoint(
        origin=str(path),
        step=manifest.step,
        batch_size=int(adapted["size"]) if adapted else job.batch.examples_per_step(manifest.world_size),
        learning_rate=rate,
    )


def restore_branch_point(path: Path, model: nn.Module, step: TrainingStep) -> None:
    """Put parameters, buffers and the optimizer's state where the checkpoint at `path` stands.

    Buffers are rank 0's. Which examples follow is the trial's own matter: branches of one seed see the same ones.

    Raises:
        UsageError: the checkpoint is of another model.
    """
    shared, own = checkpoint.load(path, 0)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    _check_shapes(path, shared["parameters"], parameters)
    _check_shapes(path, own["buffers"], buffers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shared["parameters"][name])
        for name, buffer in buffers.items():
            buffer.copy_(own["buffers"][name])
    step.load_optimizer(shared["optimizer"])


def _check_shapes(path: Path, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    shapes, here = ({name: list(tensor.shape) for name, tensor in each.items()} for each in (saved, present))
    for name in [*shapes, *here]:
        if shapes.get(name) != here.get(name):
            raise UsageError(
                f"{path}: belongs to another model: {name} is {shapes.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; give the sweep file the run's [task] table"
            )
