"""The [early_stopping] and [averaged_weights] tables: when a run has learnt enough, and which weights it ends with."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ddp.job.fields import Fraction, NonNegative, NonNegativeFloat, Positive, Section, differs_from_defaults


class EarlyStoppingSection(Section):
    """Keras's names and rules; off unless `patience` is given. What counts is the validation set, at each evaluation."""

    monitor: str = Field(default="loss", description="loss, or one of the task's metrics")
    patience: NonNegative | None = Field(
        default=None, description="evaluations without improvement after which to stop"
    )
    min_delta: NonNegativeFloat = Field(default=0.0, description="what counts as an improvement")
    mode: Literal["auto", "min", "max"] = Field(default="auto", description="auto: as the task says of the metric")
    baseline: float | None = Field(default=None, description="an evaluation that is not better than this is none")
    start_from_epoch: NonNegative = Field(default=0, description="evaluations before it do not count")
    restore_best_weights: bool = Field(
        default=False, description="end with the weights of the best evaluation, also where the run was not stopped"
    )

    @property
    def enabled(self) -> bool:
        return self.patience is not None

    @model_validator(mode="after")
    def _needs_patience(self) -> Self:
        if self.patience is None and differs_from_defaults(self):
            raise ValueError("early stopping needs patience, for example patience = 3")
        return self


class AveragedWeightsSection(Section):
    """An exponential moving average of the weights, evaluated beside them; off unless `decay` is given."""

    decay: Fraction | None = Field(
        default=None, description="the average keeps so much of itself at each update: 0.999"
    )
    every_steps: Positive = Field(default=1, description="steps between updates")

    @property
    def enabled(self) -> bool:
        return self.decay is not None

    @model_validator(mode="after")
    def _needs_decay(self) -> Self:
        if self.decay is None and differs_from_defaults(self):
            raise ValueError("averaged weights need decay, for example decay = 0.999")
        return self
