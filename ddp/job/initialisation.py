"""The [initialisation] table: what the weights are before the first step, and which of them stay so."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ddp.job.fields import PathText, Section, differing


class InitialisationSection(Section):
    weights: Literal[
        "default", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal"
    ] = Field(default="default", description="of linear and convolution layers; default: as the task made them")
    activation: Literal["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"] = Field(
        default="relu", description="that follows them: what their gain is for"
    )
    biases: Literal["zero", "leave"] = "zero"
    file: PathText | None = Field(
        default=None, description="safetensors to take tensors from, such as `ddp checkpoint export` makes"
    )
    only: list[str] = Field(default=[], description='tensors of the model to take from it: ["features.*"]; all')
    skip: list[str] = Field(default=[], description='tensors of the model that stay as they are: ["head.*"]')
    freeze: list[str] = Field(default=[], description='parameters that are not trained: ["features.*"]')

    @model_validator(mode="after")
    def _keys_have_something_to_say(self) -> Self:
        if self.file is None and (self.only or self.skip):
            raise ValueError("only and skip say what to take from a file: they need initialisation.file")
        if self.weights == "default" and (idle := differing(self, ("activation", "biases"))):
            raise ValueError(f"{', '.join(idle)} needs initialisation.weights: the default is as the task made them")
        return self
