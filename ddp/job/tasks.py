"""The [task] table: one type for each task that is known by name, and one for a user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, Tag, model_validator

from ddp.errors import UsageError
from ddp.job.fields import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section
from ddp.job.image_tasks import Activation, DigitsSection, ImagesSection, SyntheticImagesSection
from ddp.job.secrets import literal_secrets

NAME = r"[A-Za-z_]\w*"
MODULE = re.compile(rf"{NAME}(?:\.{NAME})*")
CUSTOM_TASK = re.compile(rf"{MODULE.pattern}:{NAME}")


class TextSection(Section):
    """Byte-level language model on the source text of the running Python's standard library."""

    name: Literal["text"]
    context_length: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    width: Positive = 64
    validation_examples: Positive = 512
    activation: Activation = "gelu"
    dropout: Fraction = Field(default=0.0, description="of what each block adds")
    label_smoothing: Fraction = Field(default=0.0, description="in training only; evaluation goes without")

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
    """A user's own task: `module:attr`, called with `options` as keyword arguments.

    An option may be `{ env = "NAME" }` or `{ file = "/path" }`: the task gets the text that is there (see `secrets`).
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_secret_itself(self) -> Self:
        if found := literal_secrets(self.options, "options"):
            raise ValueError("; ".join(found))
        return self


TASKS: Mapping[str, type[Section]] = {
    "digits": DigitsSection,
    "text": TextSection,
    "quadratic": QuadraticSection,
    "images": ImagesSection,
    "synthetic_images": SyntheticImagesSection,
}


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
    | Annotated[ImagesSection, Tag("images")]
    | Annotated[SyntheticImagesSection, Tag("synthetic_images")]
    | Annotated[CustomSection, Tag("custom")],
    Discriminator(_task_tag),
]


def name_in(table: object) -> object:
    """The `name` of a table that may be none."""
    return cast(Mapping[str, object], table).get("name") if isinstance(table, Mapping) else None


def check_import(task: Section, allow_import: Sequence[str]) -> None:
    """Refuse a task whose module is none of `allow_import` and below none of them.

    Raises:
        UsageError: it says what to add; or something in `allow_import` is no module's name.
    """
    if bad := [prefix for prefix in allow_import if not MODULE.fullmatch(prefix)]:
        raise UsageError(f"--allow-import {bad[0]}: not a module's name; write for example --allow-import my_tasks")
    if not isinstance(task, CustomSection):
        return
    module = task.name.partition(":")[0]
    if not any(f"{module}.".startswith(f"{prefix}.") for prefix in allow_import):
        raise UsageError(f"task.name: {task.name} runs code from outside ddp; give --allow-import {module} to allow it")
