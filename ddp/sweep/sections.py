"""The [sweep] table as it is written: types, bounds and defaults. `sweep_file` reads it and puts it together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ddp.job import Positive, PositiveFloat, Section
from ddp.job.fields import NonNegative, PathText

Number = int | float
SamplerName = Literal["random", "grid", "tpe", "qmc", "cmaes", "gp", "nsgaii"]
Share = Annotated[float, Field(gt=0, le=1)]
DAY_SECONDS = 86_400.0


class DimensionSection(Section):
    """A range (`low`, `high`) or a list of `values`."""

    low: Number | None = None
    high: Number | None = None
    scale: Literal["log", "linear"] | None = Field(
        default=None, description="log for learning rates and weight decay where left out, else linear"
    )
    values: tuple[Any, ...] | None = None
    points: Positive = Field(default=5, description="of a range in a grid")
    when: dict[str, Any] = Field(default_factory=dict, description="searched only where these keys have these values")

    @field_validator("values", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _range_or_values(self) -> Self:
        is_range = self.low is not None and self.high is not None
        if is_range == (self.values is not None) or (self.low is None) != (self.high is None):
            raise ValueError("give either low and high, or values")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.values is not None:
            if self.scale is not None:
                raise ValueError("scale belongs to a range: values have none")
            if not self.values:
                raise ValueError("values is empty")
        return self


class PrunerSection(Section):
    """When a trial is ended early: its n-th evaluation is compared with the n-th of those that finished."""

    name: Literal["median", "percentile", "successive_halving", "hyperband", "none"] = "median"
    startup_trials: NonNegative = Field(default=5, description="median, percentile: so many run to their end first")
    startup_evaluations: NonNegative = Field(default=0, description="median, percentile: of a trial, not judged by")
    percentile: Annotated[float, Field(gt=0, lt=100)] = Field(
        default=25.0, description="percentile: a trial goes on while it is among the best so many per cent"
    )


class StageSection(Section):
    """One of the stages, coarse to fine; what is left out is the sweep's or the job's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]
    trials: Positive | None = None
    epochs: PositiveFloat | None = Field(default=None, description="of each trial; may be under one")
    steps: Positive | None = Field(default=None, description="of each trial, in place of epochs")
    narrow: Share | None = Field(default=None, description="width of the ranges over those of the stage before")
    vary: tuple[str, ...] = Field(default=(), description="subjects or keys; all where left out")
    sampler: SamplerName | None = None
    set: tuple[str, ...] = Field(default=(), description="section.key=value, on top of the job")
    deadline_seconds: PositiveFloat | None = None

    @field_validator("vary", "set", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps")
        return self


class SweepSection(Section):
    """What is searched, by how many trials, and what they are."""

    job: PathText | None = Field(default=None, description="a job file, relative to this one; else its tables are here")
    directory: PathText | None = Field(default=None, description="for results; sweeps/<name of this file> if left out")
    sampler: SamplerName = "random"
    seed: NonNegative = Field(default=0, description="of the sampler; trials have the job's run.seed")
    trials: Positive = Field(default=20, description="of each stage that does not say; a grid has as many as points")
    narrow: Share = Field(default=0.5, description="width of a stage's ranges over those of the stage before")
    value: Literal["best", "last"] = Field(default="best", description="which evaluation of a trial it is ranked by")
    order: Literal["together", "in_turn"] = Field(
        default="together", description="in_turn: every stage once for each subject, the others kept at their best"
    )
    ranks: Positive = Field(default=1, description="of each trial")
    workers: Positive | None = Field(default=None, description="trials side by side; cores / ranks where left out")
    start: Literal["auto", "fork", "command"] = Field(
        default="auto",
        description="how a trial's process is made; fork: from one that has loaded torch and the task; auto: so with "
        "one rank on a CPU, else as a command",
    )
    deadline_seconds: PositiveFloat = Field(default=DAY_SECONDS, description="of a trial; then it is killed")
    silence_seconds: PositiveFloat = Field(
        default=900.0, description="without anything new in its record; then it is taken for hung and killed"
    )
    stop_seconds: PositiveFloat = Field(default=20.0, description="for a trial to stop; then it is killed")
    keep: NonNegative = Field(default=5, description="trials of a stage, the best, whose checkpoints stay")
    pruner: PrunerSection = PrunerSection()
    stages: tuple[StageSection, ...] = ()
    dimensions: dict[str, Any] = Field(default_factory=dict)
    subjects: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="named groups of dimensions")

    @field_validator("stages", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @field_validator("subjects", mode="before")
    @classmethod
    def _nor_inside(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        groups = cast(dict[str, Any], value)
        return {name: tuple(each) if isinstance(each, list) else each for name, each in groups.items()}

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"stages: {', '.join(twice)} is there twice")
        return self
