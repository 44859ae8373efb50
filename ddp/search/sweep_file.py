"""The sweep file: which batch sizes, learning rates, seeds and targets a critical-batch search runs. Loads no torch.

A [sweep] table beside a job: either the tables of a job file in the same file, or the path of one as `sweep.job`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ddp.errors import JobFileError
from ddp.job import Job, Positive, PositiveFloat, Section, apply_overrides, parse_job, read_toml
from ddp.noise.critical_batch import FEWEST_BATCH_SIZES

SMALLEST_FACTOR = 64  # of the largest batch size over the smallest: less does not show both ends of the curve
LARGE_MICRO_BATCH = 256  # examples held at once where the job leaves it open


class SweepSection(Section):
    """What is run. Lists may come in any order; they are sorted."""

    job: str | None = Field(default=None, description="a job file, relative to this one; else its tables are in here")
    directory: str | None = Field(default=None, description="where results go; sweeps/<name of this file> if left out")
    batch_sizes: tuple[Positive, ...] = tuple(4 * 2**power for power in range(9))
    learning_rates: Literal["auto"] | tuple[PositiveFloat, ...] = Field(
        default="auto",
        description="auto: around the job's by factors of 2, then sqrt 2, until the best is inside; or exactly these",
    )
    learning_rate_rule: Literal["constant", "noise_scale"] = Field(
        default="constant",
        description="noise_scale: the rate of step s is rate/(1 + B(s)/b), B(s) as measured in the run itself",
    )
    seeds: Annotated[int, Field(ge=3)] = 3
    targets: Literal["auto"] | tuple[PositiveFloat, ...] = Field(
        default="auto",
        description="training losses on the subset; auto: reached at the largest batch in 38, 48, 64 steps",
    )
    subset_examples: Positive = 512
    maximum_examples: Positive = Field(default=1_000_000, description="a run that needs more is given up")
    micro_batch_size: Positive | None = Field(
        default=None, description="examples held at once; the job's where that is given, else 256"
    )
    workers: Positive | None = Field(default=None, description="runs side by side; one a core where left out")

    @field_validator("batch_sizes", "learning_rates", "targets", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("batch_sizes")
    @classmethod
    def _far_apart(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or max(sizes) < SMALLEST_FACTOR * min(sizes):
            raise ValueError(f"the largest must be at least {SMALLEST_FACTOR} times the smallest")
        if len(set(sizes)) < FEWEST_BATCH_SIZES:
            raise ValueError(f"a fit takes at least {FEWEST_BATCH_SIZES} different ones")
        return tuple(sorted(set(sizes)))

    @field_validator("learning_rates")
    @classmethod
    def _rising(cls, rates: str | tuple[float, ...]) -> str | tuple[float, ...]:
        return rates if isinstance(rates, str) else tuple(sorted(set(rates)))

    @field_validator("targets")
    @classmethod
    def _falling(cls, targets: str | tuple[float, ...]) -> str | tuple[float, ...]:
        return targets if isinstance(targets, str) else tuple(sorted(set(targets), reverse=True))

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        for name in ("learning_rates", "targets"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        return self


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search as asked for: `section` and the job whose runs it varies."""

    section: SweepSection
    job: Job
    name: str  # the sweep file's, without its ending

    @property
    def directory(self) -> Path:
        return Path(self.section.directory or f"sweeps/{self.name}")

    @property
    def job_batch_size(self) -> int:
        """The batch size that the job's learning rate is meant for."""
        return self.job.optimizer.tuned_batch_size or self.job.batch.examples_per_step(1)

    @property
    def micro_batch_size(self) -> int:
        """Examples held at once, and those that share batch statistics."""
        return self.section.micro_batch_size or self.job.batch.micro_batch_size or LARGE_MICRO_BATCH

    def definition(self) -> dict[str, Any]:
        """Everything that results depend on, JSON-able."""
        section = self.section.model_dump(mode="json", exclude={"job", "directory", "workers"})
        names = {"task", "batch", "initialisation", "optimizer", "schedule", "evaluation"}
        return {"sweep": section, **self.job.model_dump(mode="json", include=names), "seed": self.job.run.seed}


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read, override and validate a sweep file and its job.

    Args:
        path: the TOML file.
        overrides: `section.key=value`, for the sweep's and the job's tables alike.

    Raises:
        JobFileError: one message with a line for each fault.
    """
    path = Path(path)
    table = read_toml(path, "the sweep file")
    given = table.get("sweep", {})
    if isinstance(given, Mapping) and isinstance(named := given.get("job"), str):
        if extra := sorted(table.keys() - {"sweep"}):
            raise JobFileError(f"{path}: sweep.job names a job file, and {', '.join(extra)} is here too: keep one")
        table = {**read_toml(path.parent / named, "the job file"), "sweep": given}
    table = apply_overrides(table, overrides)
    section = _parse_section(table.pop("sweep", None), str(path))
    defaults = {"run": {"steps": 1}, "batch": {"global_batch_size": 64}}
    return Sweep(section, parse_job({**defaults, **table}, source=str(path)), path.stem)


def _parse_section(table: object, source: str) -> SweepSection:
    if table is None:
        raise JobFileError(f"{source}: no [sweep] table: this is no sweep file")
    try:
        return SweepSection.model_validate(table)
    except ValidationError as error:
        faults = [
            _describe(fault["type"], fault["loc"], fault["msg"], fault["input"])
            for fault in error.errors(include_url=False)
            if not (fault["type"] == "literal_error" and isinstance(fault["input"], tuple))
        ]
        raise JobFileError("\n".join(f"{source}: {fault}" for fault in dict.fromkeys(faults))) from None


def _describe(kind: str, loc: tuple[int | str, ...], message: str, given: object) -> str:
    """One fault; of a list that could also be "auto", only what is wrong in the list."""
    valid = list(SweepSection.model_fields)
    where = ".".join(["sweep", *(str(part) for part in loc[:1])])
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(loc[0]), valid, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{where}: unknown key{hint}; valid: {', '.join(valid)}"
    what = f"{given}: " if isinstance(given, int | float) else ""
    return f"{where}: {what}{message.removeprefix('Value error, ')}"
