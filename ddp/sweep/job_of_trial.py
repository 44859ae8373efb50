"""The job of one trial: the sweep's job with the trial's values, as long as its stage says, in a place of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.job import Job, apply_overrides, parse_job
from ddp.sweep.dimensions import override
from ddp.sweep.space import Values
from ddp.sweep.stages import Stage, steps_of
from ddp.sweep.sweep_file import Sweep
from ddp.sweep.trials import Trial
from ddp.telemetry.page_file import replace_file


@dataclass(frozen=True, slots=True)
class Setting:
    """What trials depend on besides their values.

    Attributes:
        training_examples: of the task's training set.
        side_by_side: trials on this machine at a time.
        cores: that they share.
    """

    training_examples: int
    side_by_side: int
    cores: int


def overrides_of(stage: Stage, values: Values) -> list[str]:
    """What would be given to `ddp train` as `--set`: the stage's own, and the trial's values."""
    return [*stage.section.set, *(override(key, value) for key, value in values.items())]


def trial_job(sweep: Sweep, stage: Stage, trial: Trial, setting: Setting) -> Job:
    """The job of a trial's run, whose directory lies in that of its stage.

    Raises:
        JobFileError: the values do not go together.
    """
    table = with_values(sweep.table, stage, trial.values)
    table = _as_long_as(table, sweep, stage, setting.training_examples)
    run = table["run"]
    run |= {"id": trial.name, "directory": str(sweep.directory / stage.name)}
    run.setdefault("threads_per_rank", max(1, setting.cores // (setting.side_by_side * sweep.section.ranks)))
    table["metrics"] = {"enabled": False}  # trials side by side cannot have one port
    if setting.side_by_side > 1:
        table.setdefault("transport", {}).setdefault("pin", False)  # else all to the same first cores
    return parse_job(table, source=f"{stage.name}/{trial.name}")


def best_job(sweep: Sweep, stage: Stage, trial: Trial) -> Job:
    """The sweep's job, as long as it is and where it goes, with the trial's values."""
    return parse_job(with_values(sweep.table, stage, trial.values))


def with_values(table: dict[str, Any], stage: Stage, values: Values) -> dict[str, Any]:
    return apply_overrides(table, overrides_of(stage, values))


def write_job(path: Path, job: Job, note: str = "") -> None:
    """As TOML with a comment above; a link there is replaced, not followed."""
    replace_file(path, (f"# {note}\n" if note else "") + job.to_toml())


def _as_long_as(table: dict[str, Any], sweep: Sweep, stage: Stage, training_examples: int) -> dict[str, Any]:
    epochs, steps = stage.length
    if epochs is None and steps is None:
        return table
    table = copy.deepcopy(table)
    run = table.setdefault("run", {})
    for key in ("epochs", "steps"):
        run.pop(key, None)
    if epochs is not None and epochs == int(epochs):
        run["epochs"] = int(epochs)
    elif epochs is not None:
        batch = parse_job({**table, "run": {"steps": 1}}).batch
        run["steps"] = steps_of(epochs, training_examples, batch.examples_per_step(sweep.section.ranks))
    else:
        run["steps"] = steps
    return table
