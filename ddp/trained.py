"""Trained models as runs left them: of each its checkpoint, the job it was trained with, its task and the network filled.

For commands that look at several of them side by side. Of one task there is one plan, so that its data are held once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddp.checkpoint import check_run, resolve, verify
from ddp.checkpoint.names import MANIFEST, candidates
from ddp.checkpoint_command import find_checkpoint
from ddp.errors import CheckpointError, UsageError
from ddp.job import Job, check_import, load_job

if TYPE_CHECKING:
    from torch import nn

    from ddp.training.place import Place
    from ddp.training.plan import Plan
    from ddp.training.saved_model import SavedModel

logger = logging.getLogger("ddp.trained")


@dataclass(frozen=True, slots=True)
class Trained:
    """One network on this rank's device, in evaluation mode.

    Attributes:
        name: to be shown: of the run, and the step where several are of one run.
        plan: task and data; shared with others of an equal [task] table.
    """

    name: str
    job: Job
    plan: Plan
    saved: SavedModel
    module: nn.Module


def job_of(source: Path) -> Job:
    """The job of the run that `source` is, or is a checkpoint of.

    Raises:
        CheckpointError: there is nothing.
        UsageError: the run has no job.toml, or none that is valid.
    """
    return load_job(job_file_of(source))


def job_file_of(source: Path, instead: str = "give a run's directory, or a checkpoint in it") -> Path:
    """Where that job is; `instead` says what to do where the run has none.

    Raises:
        CheckpointError: there is nothing.
        UsageError: the run has no job.toml.
    """
    source = resolve(source)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such checkpoint or run")
    run = source.absolute().parent.parent if (source / MANIFEST).exists() else source
    if not (run / "job.toml").is_file():
        raise UsageError(f"{run / 'job.toml'}: not there: {instead}")
    return run / "job.toml"


def without_transport(job: Job) -> Job:
    """No gradient travels: whatever carried it where the network was trained need not be here."""
    return job.model_copy(update={"transport": job.transport.model_copy(update={"name": "auto"})})


def snapshots(run_directory: Path) -> list[Path]:
    """All checkpoints of a run that verify, the oldest first.

    Raises:
        CheckpointError: there is none.
    """
    check_run(run_directory)
    found: dict[int, Path] = {}
    for candidate in candidates(run_directory / "checkpoints"):
        try:
            verify(candidate.path)
        except CheckpointError as fault:
            logger.warning("passing over a checkpoint: %s", fault)
        else:
            found.setdefault(candidate.step, candidate.path)
    if not found:
        raise CheckpointError(f"{run_directory}: none of its checkpoints verifies")
    return [found[step] for step in sorted(found)]


def load_trained(
    place: Place,
    sources: Sequence[Path],
    *,
    runs: Sequence[Path] = (),
    averaged: bool = False,
    allow_import: Sequence[str] = (),
) -> list[Trained]:
    """The networks at `sources`, runs or checkpoints, and of all snapshots of `runs`. Collective: rank 0 looks what there is.

    Raises:
        CheckpointError, UsageError: one of them is damaged, or cannot be used here; on all ranks.
    """
    from ddp.training.agreement import from_rank_zero, together

    def find() -> list[str]:
        if place.topology.rank != 0:
            return []
        found = [find_checkpoint(each) for each in sources]
        listed = [str(path.absolute()) for path in (*found, *(path for run in runs for path in snapshots(run)))]
        if twice := next((each for each in listed if listed.count(each) > 1), None):
            raise UsageError(f"{twice}: is named twice; name each network once, and give it a weight instead")
        return listed

    paths = [Path(path) for path in json.loads(from_rank_zero(json.dumps(together(find))))]
    return together(lambda: _load(place, paths, averaged=averaged, allow_import=allow_import))


def _load(place: Place, paths: Sequence[Path], *, averaged: bool, allow_import: Sequence[str]) -> list[Trained]:
    from ddp.training.initialisation import freeze_
    from ddp.training.plan import plan_run
    from ddp.training.saved_model import read_saved_model

    loaded: list[Trained] = []
    for path, name in zip(paths, names_of(paths), strict=True):
        job = job_of(path)
        check_import(job.task, allow_import)
        saved = read_saved_model(path)
        rank = place.topology.rank % saved.world_size
        known = next((each for each in loaded if each.job.task == job.task), None)
        plan = plan_run(job, saved.world_size, rank, allow_import=allow_import) if known is None else known.plan
        module = plan.module if known is None else plan.task.model()
        freeze_(module, job.initialisation.freeze)  # a plan's own module is, others are not yet
        saved.load_into(module, averaged=averaged)
        loaded.append(Trained(name, job, plan, saved, module.to(place.device).eval()))
    return loaded


def names_of(paths: Sequence[Path]) -> list[str]:
    """Of checkpoints: the run's name where that tells them apart, else with the step, else the whole path."""
    runs = [path.parent.parent.name for path in paths]
    longer = [
        f"{run} {path.name.partition('-')[2].partition('-')[0].lstrip('0') or '0'}"
        for run, path in zip(runs, paths, strict=True)
    ]
    names = [run if runs.count(run) == 1 else long for run, long in zip(runs, longer, strict=True)]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
