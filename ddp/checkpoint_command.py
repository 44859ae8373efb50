"""The `checkpoints` and `export` commands: which checkpoints a run has, whether they are whole, and the model of one.

Imported by every command, so torch is loaded when a model is exported and not before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ddp.checkpoint.manifest import Manifest
from ddp.checkpoint.names import MANIFEST, SHARED, candidates, resolve
from ddp.checkpoint.ownership import check_run, open_own
from ddp.checkpoint.part_file import read_part
from ddp.checkpoint.reading import newest, read_manifest, verify
from ddp.checkpoint.space import in_words
from ddp.command_options import AsJson
from ddp.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint of a run. What is not known of a bad one is None."""

    path: str
    step: int
    fault: str | None
    resumed: bool  # whether `--resume auto` would take it
    epoch: float | None = None
    metric: str | None = None
    value: float | str | None = None
    size_bytes: int | None = None
    world_size: int | None = None
    age_seconds: float | None = None


def checkpoints(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")],
    as_json: AsJson = False,
) -> None:
    """List a run's checkpoints, the newest first, and verify each."""
    listed = list_checkpoints(_folder(run_directory))
    print(json.dumps([asdict(each) for each in listed], indent=2, allow_nan=False) if as_json else in_lines(listed))
    if not any(each.resumed for each in listed):
        what = "none of its checkpoints verifies" if listed else "no checkpoints"
        raise CheckpointError(f"{run_directory}: {what}; this run cannot be resumed")


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT|RUN_DIR", help="Of a run its newest that verifies.")
    ],
    target: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Where the model goes.")],
    rank_statistics: Annotated[
        bool, typer.Option("--rank-statistics", help="Each rank's own buffers too, as ranks.00003.NAME.")
    ] = False,
    averaged: Annotated[
        bool, typer.Option("--averaged", help="The moving averages of the weights, where the run kept them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Write a checkpoint's model, parameters and buffers, as one safetensors file."""
    from ddp.checkpoint.export import export as write

    path = find_checkpoint(checkpoint)
    count = write(path, target, rank_statistics=rank_statistics, averaged=averaged, overwrite=force)
    print(f"{target}: {count} tensors, {in_words(target.stat().st_size)}, of {path}")


def list_checkpoints(directory: Path) -> list[Listed]:
    """Those in a run's `checkpoints`, the newest first. Reads all of their bytes."""
    listed: list[Listed] = []
    for candidate in candidates(directory):
        known, fault = _known(candidate.path)
        resumed = fault is None and not any(each.resumed for each in listed)
        listed.append(Listed(str(candidate.path), candidate.step, fault, resumed, **known))
    return listed


def in_lines(listed: Sequence[Listed]) -> str:
    """A line each below a heading."""
    rows = [("step", "epoch", "metric", "size", "ranks", "age", "")]
    for each in listed:
        verdict = "OK, the one that --resume auto takes" if each.resumed else each.fault or "OK"
        value = each.value if isinstance(each.value, str | None) else f"{each.value:.6g}"
        row = (
            str(each.step),
            "-" if each.epoch is None else f"{each.epoch:.2f}",
            "-" if each.metric is None else f"{each.metric} {value}",
            "-" if each.size_bytes is None else in_words(each.size_bytes),
            "-" if each.world_size is None else str(each.world_size),
            "-" if each.age_seconds is None else _age(each.age_seconds),
            verdict,
        )
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join((*map(str.ljust, row, widths), row[-1])).rstrip() for row in rows)


def _known(path: Path) -> tuple[dict[str, Any], str | None]:
    """What can be told of a checkpoint, and what is wrong with it."""
    known: dict[str, Any] = {}
    try:
        manifest = read_manifest(path)
        known = {"size_bytes": manifest.size_bytes, "world_size": manifest.world_size, **_metric(manifest)}
        known["age_seconds"] = max(0.0, time.time() - (path / MANIFEST).stat().st_mtime)
        verify(path)
        known["epoch"] = _epoch(path)
    except CheckpointError as fault:
        return known, str(fault)
    except OSError as fault:  # it went meanwhile
        return known, f"{path}: {fault.strerror}"
    return known, None


def _metric(manifest: Manifest) -> dict[str, Any]:
    if manifest.metric is None:
        return {}
    value = manifest.metric.value
    return {"metric": manifest.metric.name, "value": value if abs(value) < float("inf") else str(value)}


def _epoch(path: Path) -> float | None:
    """Epochs done, in parts, where its state says so."""
    with open_own(path / SHARED) as file:
        state = read_part(path / SHARED, file, None)
    try:
        epoch, position = state["course"]["epoch"], state["course"]["position"]
        examples = state["counters"]["training_examples"]
    except (KeyError, TypeError):
        return None
    if not all(type(each) is int and 0 <= each < 1 << 62 for each in (epoch, position, examples)) or not examples:
        return None
    return epoch + position / examples


def _age(seconds: float) -> str:
    for unit, width in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * width:
            return f"{seconds // width:.0f} {unit}"
    return f"{seconds:.0f} s"


def _folder(run_directory: Path) -> Path:
    """A run's `checkpoints`, which may be given itself."""
    if not run_directory.is_dir():
        raise UsageError(f"{run_directory}: no such run directory")
    inside = run_directory / "checkpoints"
    found = run_directory if run_directory.resolve().name == "checkpoints" and not os.path.lexists(inside) else inside
    check_run(found.parent if found.name == "checkpoints" else found.resolve().parent)
    return found


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as itself or by the beginning of its name, or the newest of a run that verifies.

    Raises:
        CheckpointError: there is none.
        UsageError: there is no such folder.
    """
    resolved = resolve(path)
    if (resolved / MANIFEST).exists():
        return resolved
    found = newest(_folder(path))
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run that has one which verifies")
    return found
