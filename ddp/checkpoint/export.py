"""A checkpoint's model as one safetensors file, for whoever uses it: parameters and buffers by their names, no more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp.checkpoint import space
from ddp.checkpoint.layout import header
from ddp.checkpoint.manifest import Manifest
from ddp.checkpoint.ownership import reason
from ddp.checkpoint.part_file import write_file
from ddp.checkpoint.reading import load, read_manifest
from ddp.checkpoint.staging import Staging
from ddp.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_RUNNING_STATISTICS = ("running_mean", "running_var")


def export(
    path: Path, target: Path, *, rank_statistics: bool = False, averaged: bool = False, overwrite: bool = False
) -> int:
    """Write the model of the checkpoint at `path` to `target`, all of it or nothing; returns how many tensors.

    Running statistics are the means over the ranks, as in evaluation; of other buffers, such as counters, rank 0's.
    With `rank_statistics` each rank's own buffers are there too, as `ranks.00003.NAME`. `averaged` takes the moving
    averages of the weights, where the run kept them.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `target` not be written.
        UsageError: something is at `target`, and `overwrite` is not asked for.
    """
    if not overwrite and os.path.lexists(target):
        raise UsageError(f"{target}: exists already; give another name, or --force to replace it")
    manifest = read_manifest(path)
    state = model_state(path, manifest, rank_statistics=rank_statistics, averaged=averaged)
    part = Staging().stage(target.name, state)
    if {place.name for place in part.places} != state.keys():
        raise CheckpointError(f"{path}: a parameter has a name that no safetensors file can have")
    try:
        _write(target, header(None, part.places, _texts(path, manifest)), part.data, overwrite)
    except FileExistsError:
        raise UsageError(f"{target}: exists already; give another name, or --force to replace it") from None
    except OSError as fault:
        raise CheckpointError(f"{target}: cannot be written: {reason(fault)}") from None
    return len(part.places)


def model_state(
    path: Path, manifest: Manifest, *, rank_statistics: bool = False, averaged: bool = False
) -> dict[str, Tensor]:
    """What `export` writes, as tensors by name.

    Raises:
        CheckpointError: it cannot be read, or holds no such model.
    """
    from ddp.checkpoint.tensors import mean

    shared, own = load(path, 0)
    if averaged and "averaged_parameters" not in shared:
        raise CheckpointError(f"{path}: has no averaged weights; the run kept none (averaged_weights.decay in its job)")
    parameters, statistics = ("averaged_parameters", "averaged_buffers") if averaged else ("parameters", "buffers")
    try:
        buffers = [own[statistics], *(load(path, rank)[1][statistics] for rank in range(1, manifest.world_size))]
        merged = {
            name: mean([each[name] for each in buffers]) if _is_running_statistic(name, tensor) else tensor
            for name, tensor in buffers[0].items()
        }
        tensors = {**shared[parameters], **merged}
        names: Mapping[str, str] = shared.get("state_dict") or {name: name for name in tensors}
        state = {name: tensors[held] for name, held in names.items()}
    except (KeyError, AttributeError, TypeError, RuntimeError) as fault:
        raise CheckpointError(f"{path}: holds no model that can be exported: {fault!r}") from None
    if rank_statistics:
        for rank, held in enumerate(buffers):
            state |= {f"ranks.{rank:05d}.{name}": tensor for name, tensor in held.items()}
    return state


def _is_running_statistic(name: str, tensor: Tensor) -> bool:
    return name.rpartition(".")[2] in _RUNNING_STATISTICS and tensor.is_floating_point()


def _texts(path: Path, manifest: Manifest) -> dict[str, str]:
    texts: dict[str, Any] = {
        "format": "pt",
        "run": path.absolute().parent.parent.name,
        "step": manifest.step,
        "world_size": manifest.world_size,
    }
    if manifest.metric is not None:
        texts |= {"metric": manifest.metric.name, "value": repr(manifest.metric.value)}
    return {name: str(text) for name, text in texts.items()}


def _write(target: Path, before: bytes, data: memoryview, overwrite: bool) -> None:
    """Under another name first; 0600, as the checkpoint was."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    space.require(target.absolute().parent, len(before) + len(data), str(target))
    try:
        write_file(partial, before, data)
        if overwrite:
            partial.replace(target)
        else:
            os.link(partial, target)  # unlike a rename it fails where something has come there meanwhile
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
