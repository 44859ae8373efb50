"""The [task] table: one type for each task that is known by name, and one for a user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, Tag, model_validator

from ddp.job.fields import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section

CUSTOM_TASK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class DigitsSection(Section):
    """scikit-learn's bundled handwritten digits: 1,472 training and 325 validation images, 8x8."""

    name: Literal["digits"]
    channels: Positive = 32
    batch_norm: bool = True
    dropout: Fraction = 0.0


class TextSection(Section):
    """Byte-level language model on the source text of the running Python's standard library."""

    name: Literal["text"]
    context_length: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    width: Positive = 64
    validation_examples: Positive = 512

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class QuadraticSection(Section):
    """A bowl with noisy gradients: synthetic, its training curve and noise scale known exactly. For plain tests."""

    name: Literal["quadratic"]
    dimension: Positive = 64
    noise: NonNegativeFloat = Field(default=1.0, description="standard deviation of an example's gradient, per axis")
    distance: PositiveFloat = Field(default=8.0, description="from the bottom at the start")
    condition_number: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=1.0, description="largest over smallest curvature; the largest is 1"
    )


class CustomSection(Section):
    """A user's own task: `module:attr`, called with `options` as keyword arguments."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


TASKS: Mapping[str, type[Section]] = {"digits": DigitsSection, "text": TextSection, "quadratic": QuadraticSection}


def _task_tag(value: object) -> str | None:
    """Choose the table's type by its name, so that an error speaks of that task alone."""
    name = getattr(value, "name", None) or name_in(value)
    if not isinstance(name, str):
        return None
    if name in TASKS:
        return name
    return "custom" if CUSTOM_TASK.fullmatch(name) else None


TaskSection = Annotated[
    Annotated[DigitsSection, Tag("digits")]
    | Annotated[TextSection, Tag("text")]
    | Annotated[QuadraticSection, Tag("quadratic")]
    | Annotated[CustomSection, Tag("custom")],
    Discriminator(_task_tag),
]


def name_in(table: object) -> object:
    """The `name` of a table that may be none."""
    return cast(Mapping[str, object], table).get("name") if isinstance(table, Mapping) else None
