"""What of a job holds a model back from fitting its training data, and the same job without it.

Checks of the data's own loss, such as whether 20 examples can be fitted, have to be made without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddp.job.fields import Section
from ddp.job.job_file import Job
from ddp.job.tasks import CustomSection

NAMES = ("dropout", "label_smoothing", "augment")  # of a task's keys


@dataclass(frozen=True, slots=True)
class Regulariser:
    """A key of the job that regularises, and its value there: `optimizer.weight_decay` or one of the task's."""

    key: str
    value: Any

    @property
    def is_on(self) -> bool:
        return bool(self.value)


def regularisers(job: Job) -> list[Regulariser]:
    """Those that the job has a key for, whether on or off."""
    decay = Regulariser("optimizer.weight_decay", job.optimizer.weight_decay)
    table, prefix = _task_keys(job)
    return [decay, *(Regulariser(f"{prefix}.{name}", table[name]) for name in NAMES if name in table)]


def with_regulariser(job: Job, key: str, value: float | bool) -> Job:
    """The job with another value of one of its regularisers; validated as a job file is.

    Raises:
        pydantic.ValidationError: the section does not admit that value.
    """
    if key == "optimizer.weight_decay":
        return job.model_copy(update={"optimizer": _replaced(job.optimizer, "weight_decay", float(value))})
    name = key.rpartition(".")[2]
    if isinstance(job.task, CustomSection):
        task = job.task.model_copy(update={"options": {**job.task.options, name: value}})
    else:
        task = _replaced(job.task, name, value)
    return job.model_copy(update={"task": task})


def without_regularisation(job: Job) -> Job:
    """The job with weight decay 0 and the task's dropout, label smoothing and augmentation off, where it has such keys.

    Dropout that a custom model has without a key for it stays, and so does a weight decay of [[optimizer.groups]].
    """
    for regulariser in regularisers(job):
        if regulariser.is_on and (off := _off(regulariser.value)) is not None:
            job = with_regulariser(job, regulariser.key, off)
    return job


def _task_keys(job: Job) -> tuple[Mapping[str, Any], str]:
    if isinstance(job.task, CustomSection):
        return job.task.options, "task.options"
    return {name: getattr(job.task, name) for name in type(job.task).model_fields}, "task"


def _off(value: object) -> float | bool | None:
    """What switches a key of this type off; None where only its owner knows."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return 0
    return 0.0 if isinstance(value, float) else None


def _replaced(section: Section, name: str, value: object) -> Any:
    return type(section).model_validate({**section.model_dump(), name: value})
