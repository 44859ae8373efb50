"""The [schedule] table: how the learning rate goes over a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ddp.job.fields import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, differing

ANOTHER_NAME = {"1/t": "inverse_time"}
# The settings beside warm-up that each schedule has.
OWN: Mapping[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("step_every_steps", "step_every_epochs", "factor"),
    "exponential": ("decay_steps", "decay_epochs", "factor"),
    "inverse_time": ("decay_steps", "decay_epochs"),
    "cosine": ("final_fraction",),
    "plateau": ("factor", "metric", "patience", "threshold", "threshold_mode", "cooldown", "min_learning_rate"),
}
_DECAY = ("decay_steps", "decay_epochs")
NEEDED = {"step": ("step_every_steps", "step_every_epochs"), "exponential": _DECAY, "inverse_time": _DECAY}


class ScheduleSection(Section):
    name: Literal["constant", "step", "exponential", "inverse_time", "cosine", "plateau"] = Field(
        default="constant", description='"1/t" is another name of inverse_time'
    )
    warmup_steps: NonNegative = 0
    warmup_epochs: NonNegativeFloat | None = None
    step_every_steps: Positive | None = Field(default=None, description="step: between two falls")
    step_every_epochs: PositiveFloat | None = Field(default=None, description="the same, in epochs")
    decay_steps: Positive | None = Field(
        default=None, description="exponential: to fall by `factor`; inverse_time: to fall to a half"
    )
    decay_epochs: PositiveFloat | None = Field(default=None, description="the same, in epochs")
    factor: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="that the rate falls by; 0.1 for step and plateau where left out"
    )
    final_fraction: Fraction = Field(default=0.0, description="cosine: last learning rate / peak")
    metric: str | None = Field(default=None, description="plateau: evaluation.metric where left out")
    patience: NonNegative = Field(default=10, description="plateau: evaluations without a gain that are put up with")
    threshold: NonNegativeFloat = Field(default=1e-4, description="plateau: what counts as a gain")
    threshold_mode: Literal["relative", "absolute"] = "relative"
    cooldown: NonNegative = Field(default=0, description="plateau: evaluations after a fall that are not counted")
    min_learning_rate: NonNegativeFloat = Field(default=0.0, description="plateau: it falls no further")

    @field_validator("name", mode="before")
    @classmethod
    def _one_name_each(cls, value: object) -> object:
        return ANOTHER_NAME.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _default_factor(cls, table: object) -> object:
        if not isinstance(table, Mapping):
            return table
        given = cast(Mapping[str, Any], table)
        return {"factor": 0.1, **given} if given.get("name") in ("step", "plateau") else given

    @model_validator(mode="after")
    def _keys_of_this_schedule(self) -> Self:
        foreign = {key for keys in OWN.values() for key in keys} - set(OWN[self.name])
        # final_fraction was let pass with every schedule from the start
        if wrong := sorted(differing(self, foreign - {"final_fraction"})):
            raise ValueError(f"{', '.join(wrong)} is not a setting of {self.name}")
        if self.warmup_epochs is not None and self.warmup_steps:
            raise ValueError("give either warmup_steps or warmup_epochs")
        lengths = NEEDED.get(self.name, ())
        if lengths and sum(getattr(self, key) is not None for key in lengths) != 1:
            raise ValueError(f"{self.name} needs either {' or '.join(lengths)}")
        if self.name == "exponential" and self.factor is None:
            raise ValueError("exponential needs a factor")
        return self

    def warmup(self, steps_per_epoch: float) -> float:
        """Steps that the rate rises over."""
        return self.warmup_steps if self.warmup_epochs is None else self.warmup_epochs * steps_per_epoch

    def period(self, steps_per_epoch: float) -> float:
        """Steps of step's between two falls, of exponential's and inverse_time's decay; 1 for the others."""
        epochs = self.step_every_epochs if self.step_every_epochs is not None else self.decay_epochs
        return epochs * steps_per_epoch if epochs is not None else float(self.step_every_steps or self.decay_steps or 1)
