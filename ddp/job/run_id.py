"""Names of runs: which are valid, who gives them, and a fresh one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

from ddp.errors import UsageError

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TARGETS = "targets"  # the folder beside the runs, see ddp.telemetry.targets
RUN_ID_VARIABLE = "DDP_RUN_ID"  # set by `launch`, so that every rank and every restart finds one run


def check_run_id(value: str) -> str:
    """`value` if it can name a run directory, else a ValueError that says what can."""
    if not RUN_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a run id: 1 to 64 letters, digits, dots, hyphens or underscores, "
            "the first a letter or digit"
        )
    if value == TARGETS:
        raise ValueError(f"{value!r} is not a run id: the runs' directory has a folder of that name, for Prometheus")
    return value


def run_id_is_given(job_run_id: str | None, environ: Mapping[str, str]) -> bool:
    """Whether something other than chance names the run, so that a restart finds it."""
    return job_run_id is not None or resolve_run_id(None, environ, "") != ""


def resolve_run_id(job_run_id: str | None, environ: Mapping[str, str], generated: str) -> str:
    """The run's id: the job's own, else `launch`'s, Slurm's or torchrun's, so that a restart finds its run.

    Raises:
        UsageError: the variable that decides does not hold a valid run id.
    """
    if job_run_id is not None:
        return job_run_id
    for name in (RUN_ID_VARIABLE, "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        value = environ.get(name, "")
        if value in ("", "none"):  # "none" is what torchrun says where it was given no id
            continue
        try:
            return check_run_id(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}; set run.id in the job file") from None
    return generated


def generate_run_id(name: str, utc: datetime, token: str) -> str:
    """A fresh run id: `name`, cut and cleaned until it can begin one, the time, and `token` against collisions."""
    tail = f"-{utc:%Y%m%d-%H%M%S}-{token}"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[: 64 - len(tail)] or "run"
    return check_run_id(stem + tail)
