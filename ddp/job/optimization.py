"""The [optimizer] and [schedule] tables."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ddp.job.fields import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class OptimizerSection(Section):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    momentum: Fraction = Field(default=0.0, description="sgd only")
    nesterov: bool = Field(default=False, description="sgd only")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="adam and adamw only")
    epsilon: PositiveFloat = Field(default=1e-8, description="adam and adamw only")
    weight_decay: NonNegativeFloat = 0.0
    gradient_clip_norm: PositiveFloat | None = Field(default=None, description="norm of the mean gradient")
    sam_rho: PositiveFloat | None = Field(
        default=None,
        description="sharpness-aware: the gradient at the weights moved this far uphill along the rank's own; 0.05 for example",
    )
    learning_rate_rule: Literal["auto", "none", "linear", "sqrt", "noise_scale", "adascale"] = Field(
        default="auto",
        description="how the learning rate follows the batch size; auto: noise_scale. With adascale run.epochs and run.steps "
        "count steps at tuned_batch_size, each step of the run as its gain",
    )
    learning_rate_exponent: NonNegativeFloat | None = Field(
        default=None, description="of noise_scale's and adascale's factors: 1 for sgd, 1/2 for Adam where left out"
    )
    tuned_batch_size: Positive | None = Field(
        default=None, description="the global batch size that learning_rate was found at; the run's where left out"
    )

    @field_validator("betas", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _keys_of_this_optimizer(self) -> Self:
        foreign = {"sgd": {"betas", "epsilon"}}.get(self.name, {"momentum", "nesterov"})
        defaults = {key: field.default for key, field in OptimizerSection.model_fields.items()}
        if wrong := sorted(key for key in foreign if getattr(self, key) != defaults[key]):
            raise ValueError(f"{', '.join(wrong)} is not a setting of {self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.learning_rate_exponent is not None and self.learning_rate_rule in ("none", "linear", "sqrt"):
            raise ValueError(f"learning_rate_exponent is not a setting of the rule {self.learning_rate_rule}")
        return self

    @property
    def rule(self) -> Literal["none", "linear", "sqrt", "noise_scale", "adascale"]:
        """The learning-rate rule that "auto" stands for, or the one given."""
        return "noise_scale" if self.learning_rate_rule == "auto" else self.learning_rate_rule

    @property
    def rule_exponent(self) -> float:
        """Of the factors of noise_scale and adascale: Adam's steps have a length of their own (Malladi et al. 2022)."""
        if self.learning_rate_exponent is not None:
            return self.learning_rate_exponent
        return 1.0 if self.name == "sgd" else 0.5


class ScheduleSection(Section):
    name: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = Field(default=0.0, description="cosine: last learning rate / peak")
