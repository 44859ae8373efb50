"""A model out of a checkpoint, or of the file that `export` made of one, for whoever uses it without a trainer.

Running statistics are the means over the ranks that wrote the checkpoint, as in training's own evaluation; other buffers,
and what modules keep besides, are rank 0's. So the model is the same with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddp.checkpoint import MANIFEST, SHARED, Metric, load_part, rank_file, read_manifest
from ddp.checkpoint.tensors import make, mean
from ddp.checkpoint.weights_file import WeightsFile
from ddp.errors import CheckpointError
from ddp.training.data import OPEN
from ddp.training.evaluation import running_statistics
from ddp.training.extra_state import ExtraState
from ddp.training.state import Buffers, Parameters, check_same

EXPORTED_RANK = "ranks."  # begins the names of one rank's own statistics in an exported file
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """One set of parameters, and the buffers that go with them of each rank."""

    parameters: Tensors
    buffers: Sequence[Tensors]


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What a file or a folder holds of a model.

    Attributes:
        path: where it is.
        weights: of a checkpoint; None for an exported file.
        averaged: the moving average of the weights, where the run kept one.
        extra: what rank 0's modules keep besides.
        state: of an exported file, by the names of the module's state_dict.
        step: that it is of; None where that is not known, and likewise `epoch` and `metric`.
        world_size: of the run that wrote it.
    """

    path: Path
    weights: Weights | None = None
    averaged: Weights | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    state: Tensors = field(default_factory=dict)
    step: int | None = None
    epoch: float | None = None
    metric: Metric | None = None
    world_size: int = 1

    def load_into(self, module: nn.Module, *, averaged: bool = False) -> None:
        """Fill `module`, which is on the CPU or on any device, with it; with `averaged`, with the average.

        Raises:
            CheckpointError: it belongs to another model, or there is no average; nothing is changed then.
        """
        if averaged and self.averaged is None:
            raise CheckpointError(f"{self.path}: has no averaged weights; its run kept none (averaged_weights.decay)")
        weights = self.averaged if averaged else self.weights
        try:
            if weights is None:
                _load_state(module, self.state)
            else:
                _load_weights(module, weights)
                ExtraState(module).load_state_dict(self.extra)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}; give the job that it was trained with") from None


def read_saved_model(path: Path) -> SavedModel:
    """Read a checkpoint's folder or an exported file, whose content is verified where there are sums to verify it by.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds no model.
    """
    return _read_checkpoint(path) if (path / MANIFEST).exists() or path.is_dir() else _read_exported(path)


def _read_checkpoint(path: Path) -> SavedModel:
    manifest = read_manifest(path)
    shared = load_part(path, SHARED, manifest, make)
    own: list[dict[str, Any]] = []
    for rank in range(manifest.world_size):
        part = load_part(path, rank_file(rank), manifest, make)
        own.append({name: part.get(name) for name in ("buffers", "averaged_buffers", "extra_state")})
    try:
        averaged = shared.get("averaged_parameters")
        return SavedModel(
            path,
            weights=Weights(dict(shared["parameters"]), [dict(each["buffers"]) for each in own]),
            averaged=averaged and Weights(dict(averaged), [dict(each["averaged_buffers"]) for each in own]),
            extra=dict(own[0]["extra_state"] or {}),
            step=manifest.step,
            epoch=_epoch(shared),
            metric=manifest.metric,
            world_size=manifest.world_size,
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as fault:
        raise CheckpointError(f"{path}: holds no model: {fault!r}") from None


def _epoch(shared: Mapping[str, Any]) -> float | None:
    """None of a stream that has none."""
    course, examples = shared["course"], shared["counters"]["training_examples"]
    if examples >= OPEN:
        return None
    return course["epoch"] + course["position"] / examples


def _read_exported(path: Path) -> SavedModel:
    with WeightsFile(path) as file:
        names = [name for name in file.shapes if not name.startswith(EXPORTED_RANK)]
        state = {name: file.tensor(name) for name in names}
    step, world_size = (_whole(file.texts.get(name)) for name in ("step", "world_size"))
    return SavedModel(path, state=state, step=step, world_size=world_size or 1)


def _whole(text: object) -> int | None:
    """A number out of a file's texts, which may say anything."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10 else None


def _load_weights(module: nn.Module, weights: Weights) -> None:
    parameters, buffers = Parameters(module), Buffers(module)
    parameters.check_state(weights.parameters)
    for each in weights.buffers:
        buffers.check_state(each)
    present = buffers.state_dict()
    statistics = {id(tensor) for tensor in running_statistics(module)}
    merged = {
        name: mean([each[name] for each in weights.buffers]) if id(present[name]) in statistics else tensor
        for name, tensor in weights.buffers[0].items()
    }
    parameters.load_state_dict(weights.parameters)
    buffers.load_state_dict(merged)


def _load_state(module: nn.Module, state: Tensors) -> None:
    present = {name: each for name, each in module.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    check_same("tensor", state, present)
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(state[name])
