"""The [sampling] table: which examples of the training set a run draws."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ddp.job.fields import NonNegative, Section, differing


class SamplingSection(Section):
    """How an epoch's order comes about. Every way tells each rank's share exactly."""

    name: Literal["uniform", "class_balanced", "loss_weighted"] = Field(
        default="uniform",
        description="uniform: each example once an epoch; class_balanced: every class as often, with replacement; "
        "loss_weighted: by the loss that was last seen of each example, with replacement",
    )
    uniform_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="loss_weighted: share of the draws that goes by no loss; 1: all of them"
    )
    correct_bias: bool = Field(
        default=False,
        description="loss_weighted: multiply a drawn example's loss by 1 / (N p), so that the gradient is unbiased for "
        "the training set as it is",
    )
    shuffle_buffer: NonNegative = Field(
        default=0, description="a streaming training set: so many examples after each other are shuffled; 0: none"
    )

    @model_validator(mode="after")
    def _keys_of_this_sampling(self) -> Self:
        wrong = differing(self, ("uniform_share", "correct_bias"))
        if wrong and self.name != "loss_weighted":
            raise ValueError(f"{', '.join(wrong)} is not a setting of {self.name}")
        return self
