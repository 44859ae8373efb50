"""Which run this is, and from which checkpoint it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ddp import checkpoint
from ddp.errors import CheckpointError, UsageError
from ddp.job import Job, generate_run_id, resolve_run_id


@dataclass(frozen=True, slots=True)
class Origin:
    """The job with its run's place filled in, and what to start from: nothing, or `checkpoint` at `step`."""

    job: Job
    run_id: str
    checkpoint: Path | None
    step: int


def find_origin(job: Job, environ: Mapping[str, str], resume: str | None, utc: datetime, token: str) -> Origin:
    """Resolve the run id and `--resume`.

    Args:
        resume: None, "auto", a run directory or a checkpoint. A path also says which run goes on, unless the
            job names another one: that one then starts from the checkpoint.
        utc, token: of a run id that nobody gave.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        UsageError: there is nothing at the path, "auto" without anything that names the run, or the run's directory is
            not its user's alone.
    """
    if resume is None or resume == "auto":
        generated = generate_run_id(job.task.name, utc, token)
        run_id = resolve_run_id(job.run.id, environ, generated)
        if resume == "auto" and run_id == generated:
            raise UsageError("--resume auto: which run? Give its id, --set run.id=ID, or its directory, --resume PATH")
        checkpoints = Path(job.run.directory) / run_id / "checkpoints"
        found = _newest(checkpoints) if resume else None
        if resume and found is None and any(checkpoints.glob("step-*")):
            raise UsageError(
                f"--resume auto: none of the checkpoints in {checkpoints} can be read; choose another run.id"
            )
        return _origin(job, run_id, found)
    path = checkpoint.resolve(Path(resume).resolve())  # "." and "step-00000120" say too little of where they are
    if (path / "checkpoints").is_dir():
        found, run_path = _newest(path / "checkpoints"), path
    elif (path / checkpoint.MANIFEST).is_file():
        found, run_path = path, path.parent.parent
    else:
        raise UsageError(f"--resume {resume}: neither a run directory nor a checkpoint (runs/ID/checkpoints/step-...)")
    if found is None:
        raise UsageError(f"--resume {resume}: this run has no checkpoint that can be read")
    if job.run.id is not None:
        return _origin(job, job.run.id, found)
    section = job.run.model_copy(update={"id": run_path.name, "directory": str(run_path.parent)})
    return _origin(job.model_copy(update={"run": section}), run_path.name, found)


def _newest(checkpoints: Path) -> Path | None:
    try:
        checkpoint.check_run(checkpoints.parent)
    except CheckpointError as fault:
        raise UsageError(f"--resume: {fault}") from None
    return checkpoint.newest(checkpoints)


def _origin(job: Job, run_id: str, found: Path | None) -> Origin:
    if job.run.id != run_id:
        job = job.model_copy(update={"run": job.run.model_copy(update={"id": run_id})})
    if found is None:
        return Origin(job, run_id, None, 0)
    return Origin(job, run_id, found, checkpoint.read_manifest(found).step)
