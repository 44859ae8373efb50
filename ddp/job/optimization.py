"""The [optimizer] table: which optimizer, its own settings, its parameter groups, how its rate follows the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ddp.job.fields import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section, differing

# Where they are not what the fields below say; torch's own.
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9},
    "adagrad": {"learning_rate": 1e-2, "epsilon": 1e-10},
    "rmsprop": {"learning_rate": 1e-2},
    "adadelta": {"learning_rate": 1.0, "epsilon": 1e-6},
}
_FOLLOWING = ("final_momentum", "momentum_steps", "momentum_epochs")
# The settings that not every optimizer has, and those that each has of them.
OWN: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "nesterov", *_FOLLOWING),
    "momentum": ("momentum", *_FOLLOWING),
    "nesterov": ("momentum", "nesterov", *_FOLLOWING),
    "adagrad": ("epsilon", "learning_rate_decay", "initial_accumulator_value"),
    "rmsprop": ("momentum", "epsilon", "alpha", "centered", *_FOLLOWING),
    "adadelta": ("epsilon", "rho"),
    "adam": ("betas", "epsilon", *_FOLLOWING),
    "adamw": ("betas", "epsilon", *_FOLLOWING),
}


class GroupSection(Section):
    """One of [[optimizer.groups]]: parameters with a rate and a weight decay of their own."""

    parameters: Annotated[list[str], Field(min_length=1)] = Field(
        description='names of parameters, with "*" for any part: ["head.*", "*.bias"]; each goes to the first group that names it'
    )
    learning_rate_factor: PositiveFloat = Field(default=1.0, description="times the learning rate")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="optimizer.weight_decay where left out")


class OptimizerSection(Section):
    name: Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adadelta", "adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = Field(default=1e-3, description="1e-2 for adagrad and rmsprop, 1.0 for adadelta")
    momentum: Fraction = Field(
        default=0.0, description="sgd and rmsprop; 0.9 for momentum and nesterov. Adam's is betas[0]"
    )
    nesterov: bool = Field(default=False, description="of sgd; nesterov has it by its name")
    final_momentum: Fraction | None = Field(
        default=None, description="that momentum, or Adam's betas[0], goes to in a straight line"
    )
    momentum_steps: Positive | None = Field(default=None, description="how long it takes to get there")
    momentum_epochs: PositiveFloat | None = Field(default=None, description="the same, in epochs")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="adam and adamw only")
    epsilon: PositiveFloat = Field(
        default=1e-8, description="not for sgd; 1e-10 for adagrad, 1e-6 for adadelta where left out"
    )
    alpha: Fraction | None = Field(default=None, description="rmsprop only: of the mean square, 0.99 where left out")
    centered: bool | None = Field(default=None, description="rmsprop only: by the variance, not the mean square")
    rho: Fraction | None = Field(default=None, description="adadelta only: of its two means, 0.9 where left out")
    learning_rate_decay: NonNegativeFloat | None = Field(
        default=None, description="adagrad only: step t at rate / (1 + (t - 1) decay)"
    )
    initial_accumulator_value: NonNegativeFloat | None = Field(default=None, description="adagrad only")
    weight_decay: NonNegativeFloat = 0.0
    groups: list[GroupSection] = Field(default=[], description="parameters with a rate or weight decay of their own")
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
        default=None,
        description="of noise_scale's and adascale's factors: 1 for sgd, momentum and nesterov, 1/2 for the others where left out",
    )
    tuned_batch_size: Positive | None = Field(
        default=None, description="the global batch size that learning_rate was found at; the run's where left out"
    )

    @field_validator("betas", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_this_optimizer(cls, table: object) -> object:
        if not isinstance(table, Mapping):
            return table
        given = cast(Mapping[str, Any], table)
        name = given.get("name")
        return {**DEFAULTS.get(name, {}), **given} if isinstance(name, str) else given

    @model_validator(mode="after")
    def _keys_of_this_optimizer(self) -> Self:
        foreign = {key for keys in OWN.values() for key in keys} - set(OWN[self.name])
        if wrong := sorted(differing(self, foreign)):
            raise ValueError(f"{', '.join(wrong)} is not a setting of {self.name}{self._instead(wrong)}")
        if (self.uses_nesterov or self.name == "momentum") and not self.momentum:
            raise ValueError(f"{'nesterov' if self.uses_nesterov else self.name} needs a momentum above 0")
        if self.learning_rate_exponent is not None and self.learning_rate_rule in ("none", "linear", "sqrt"):
            raise ValueError(f"learning_rate_exponent is not a setting of the rule {self.learning_rate_rule}")
        return self

    @model_validator(mode="after")
    def _momentum_has_somewhere_to_go(self) -> Self:
        lengths = [each for each in (self.momentum_steps, self.momentum_epochs) if each is not None]
        if self.final_momentum is None and lengths:
            raise ValueError("momentum_steps and momentum_epochs need final_momentum")
        if self.final_momentum is not None and len(lengths) != 1:
            raise ValueError("final_momentum needs either momentum_steps or momentum_epochs")
        if self.final_momentum is not None and not self.first_momentum:
            raise ValueError("final_momentum needs a momentum above 0 to start from")
        return self

    @property
    def uses_nesterov(self) -> bool:
        """By its name, or as a setting of sgd."""
        return self.name == "nesterov" or self.nesterov

    @property
    def first_momentum(self) -> float:
        """Of the first step: `momentum`, or Adam's betas[0]; 0 for what has none."""
        return self.betas[0] if self.name in ("adam", "adamw") else self.momentum

    @property
    def rule(self) -> Literal["none", "linear", "sqrt", "noise_scale", "adascale"]:
        """The learning-rate rule that "auto" stands for, or the one given."""
        return "noise_scale" if self.learning_rate_rule == "auto" else self.learning_rate_rule

    @property
    def rule_exponent(self) -> float:
        """Of the factors of noise_scale and adascale.

        SGD's step, with momentum or without, is linear in the gradient: 1. All others divide by a root of squared
        gradients, which shrinks like the noise, 1/sqrt(b), where noise dominates: half of what a larger batch is worth is
        in the step already (Malladi et al. 2022, arXiv:2205.10287, for Adam and RMSProp; Adagrad's sum and Adadelta's mean
        are squares of the same gradients).
        """
        if self.learning_rate_exponent is not None:
            return self.learning_rate_exponent
        return 1.0 if self.name in ("sgd", "momentum", "nesterov") else 0.5

    def _instead(self, wrong: list[str]) -> str:
        if "momentum" in wrong and self.name in ("adam", "adamw"):
            return "; its momentum is betas[0]"
        return '; use name = "nesterov"' if "nesterov" in wrong and self.name == "momentum" else ""
