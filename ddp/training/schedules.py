"""The learning rate: a schedule over the run's length, times a factor for the batch size.

`learning_rate` is the schedule, a function of a position counted in steps. `LearningRate` keeps that position and the
noise scale that the factor was last worked out with; both go into checkpoints, and the rate is a function of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddp.job import Job, ScheduleSection
from ddp.noise.learning_rate import clamped_noise_scale, gain, rate_factor
from ddp.noise.noise_scale import Reading


def learning_rate(step: float, steps: float, peak: float, section: ScheduleSection) -> float:
    """The rate for step `step` (1 for the first) of `steps`; between steps where a batch counts as part of one.

    It rises in a straight line, peak / warmup_steps in the first step and `peak` in step warmup_steps. From
    there "constant" stays; "cosine" falls along half a cosine to final_fraction * peak in the last step
    (Loshchilov and Hutter 2017, equation 5, without restarts). Beyond the last step it stays there.
    """
    if step < section.warmup_steps:
        return peak * step / section.warmup_steps
    if section.name == "constant":
        return peak
    top = max(section.warmup_steps, 1)
    progress = min(max(step - top, 0.0) / (steps - top), 1.0) if steps > top else 0.0
    falling = (1 + math.cos(math.pi * progress)) / 2
    return peak * (section.final_fraction + (1 - section.final_fraction) * falling)


@dataclass(slots=True)
class LearningRate:
    """The rate of each step of a run whose batch size may change.

    The schedule is counted in steps of the batch size that the run began with: with run.steps every step is one;
    with run.epochs a step is what it takes of an epoch, so that the schedule ends with the last epoch whatever the
    batch does. Under "adascale" it is counted in steps of the tuned batch size, of which a step is worth its gain; the
    run ends when they are done (Johnson et al. 2020, algorithm 1).
    """

    job: Job
    first_batch_size: int  # the global one that the run began with
    first_steps_per_epoch: int
    position: float = 0.0  # steps of the schedule that are done
    noise_scale: float = math.nan  # that the factor uses; NaN while there is none

    @property
    def tuned_batch_size(self) -> int:
        """The global batch size at which optimizer.learning_rate holds."""
        return self.job.optimizer.tuned_batch_size or self.first_batch_size

    @property
    def length(self) -> float:
        """Steps of the schedule in the whole run."""
        if self.job.run.steps is not None:
            return self.job.run.steps
        steps = (self.job.run.epochs or 0) * self.first_steps_per_epoch
        return steps * self.first_batch_size / self.tuned_batch_size if self.counts_gains else steps

    @property
    def follows_readings(self) -> bool:
        """Whether the noise scale moves the rate: not at the tuned batch size, where every factor is 1."""
        return self.job.optimizer.rule in ("noise_scale", "adascale") and self.tuned_batch_size != self.first_batch_size

    @property
    def counts_gains(self) -> bool:
        """Whether a step counts as what it is worth at the tuned batch size, which leaves open how many there will be."""
        return self.job.optimizer.rule == "adascale"

    def is_over(self, step_count: int, epoch: int) -> bool:
        """Whether the run ends after so many steps and whole epochs."""
        if self.counts_gains:
            return self.position >= self.length
        return (
            step_count >= self.job.run.steps if self.job.run.steps is not None else epoch >= (self.job.run.epochs or 0)
        )

    def factor(self, batch_size: int) -> float:
        """Of a step at this global batch size, by the rule, with the noise scale as it is known now."""
        section = self.job.optimizer
        return rate_factor(section.rule, self.tuned_batch_size, batch_size, self.noise_scale, section.rule_exponent)

    def advance(self, batch_size: int, steps_per_epoch: float, reading: Reading | None) -> float:
        """Go on by one step and return its rate.

        Args:
            batch_size: the global one that the run aims at now.
            steps_per_epoch: how many steps like this one make an epoch.
            reading: the headline noise scale, this step included; None where it is not measured.
        """
        self._learn(reading)
        self.position += self._worth(batch_size, steps_per_epoch, reading)
        peak = self.job.optimizer.learning_rate
        return learning_rate(self.position, self.length, peak, self.job.schedule) * self.factor(batch_size)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("first_batch_size", "first_steps_per_epoch", "position", "noise_scale")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, at whatever batch size the run now has."""
        for name in self.state_dict():
            setattr(self, name, state[name])

    def _learn(self, reading: Reading | None) -> None:
        """adascale takes the running means as they are, the noise scale's rule resolved readings and keeps the last."""
        if reading is None:
            return
        if self.counts_gains:
            self.noise_scale = clamped_noise_scale(reading.variance_trace, reading.squared_norm)
        elif reading.state == "resolved":
            self.noise_scale = reading.noise_scale

    def _worth(self, batch_size: int, steps_per_epoch: float, reading: Reading | None) -> float:
        if self.counts_gains:
            if reading is None:
                return 1.0
            return gain(reading.variance_trace, reading.squared_norm, self.tuned_batch_size, batch_size)
        return 1.0 if self.job.run.steps is not None else self.first_steps_per_epoch / steps_per_epoch
