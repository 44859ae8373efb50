"""The [record] table: parameters whose entries the run's record keeps."""

from __future__ import annotations

from typing import Any, cast

from pydantic import Field, field_validator

from ddp.job.fields import Positive, Section


class RecordSection(Section):
    """Which parameters are written down, how much of each, and in which steps."""

    parameters: tuple[str, ...] = Field(
        default=(), description='names, or patterns of names, of parameters to record: "0.weight", "*.bias"'
    )
    max_entries: Positive = Field(default=32, description="of each parameter, evenly spread over it")
    parameters_first_steps: Positive = Field(default=32, description="all of the first so many steps are recorded")
    parameters_every: Positive = Field(default=32, description="then the steps that this divides")

    @field_validator("parameters", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @field_validator("parameters")
    @classmethod
    def _a_pattern_has_letters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("a pattern is empty")
        return value
