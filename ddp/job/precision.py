"""The [precision] and [normalisation] tables: in what numbers a model computes, and what memory it trades for time."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ddp.job.fields import Positive, Section

ModulePattern = Annotated[str, Field(min_length=1)]


class PrecisionSection(Section):
    """Parameters, gradients and optimizer stay float32; what is narrower is the arithmetic of forward and backward."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of matrix products and convolutions, by autocast; float16 scales the loss"
    )
    initial_loss_scale: Annotated[float, Field(ge=1, le=2.0**40)] = Field(
        default=2.0**16, description="float16 only; a power of two, as scaling then loses no bit"
    )
    loss_scale_growth_steps: Positive = Field(
        default=2000, description="float16 only: finite steps in a row after which the scale doubles"
    )
    compile: bool = Field(default=False, description="torch.compile; needs a C++ compiler on CPU")
    activation_checkpointing: tuple[ModulePattern, ...] = Field(
        default=(),
        description='modules by name, "blocks.*" for example, whose activations are computed again in backward instead of kept',
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _scale_is_a_power_of_two(self) -> Self:
        if math.frexp(self.initial_loss_scale)[0] != 0.5:
            raise ValueError(f"initial_loss_scale {self.initial_loss_scale:g} is no power of two")
        scaled = (self.initial_loss_scale, self.loss_scale_growth_steps) != (2.0**16, 2000)
        if scaled and self.dtype != "float16":
            raise ValueError(f"a loss scale is not a setting of {self.dtype}, whose range is that of float32")
        return self


class NormalisationSection(Section):
    """How batch normalisation goes with several ranks."""

    sync_batch_norm: bool = Field(
        default=False, description="statistics over all ranks' examples of a micro-batch, instead of each rank's own"
    )
