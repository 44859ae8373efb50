"""What the tables of the job file are made of: bounded numbers, and a table that admits nothing unknown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 1 << 62  # sums of two still fit what the record and the ranks count in

Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _no_zero(value: str) -> str:
    if "\0" in value:
        raise ValueError("has a zero character, which no name may have")
    return value


PathText = Annotated[str, AfterValidator(_no_zero)]


class Section(BaseModel):
    """A table of the job file: no unknown keys, no silent conversions, no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


def differs_from_defaults(section: Section) -> bool:
    """Whether any key says something; which keys were written does not count, as a resolved job has them all."""
    return bool(differing(section, type(section).model_fields))


def differing(section: Section, keys: Iterable[str]) -> list[str]:
    """Those of the keys that say something else than their defaults."""
    fields = type(section).model_fields
    return [key for key in keys if getattr(section, key) != fields[key].default]
