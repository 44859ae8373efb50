"""The learning rate: a schedule over the run's length, times a factor for the batch size; and the momentum beside it.

`learning_rate` and `momentum` are the schedules, functions of a position counted in steps. `LearningRate` keeps that
position, the noise scale that the factor was last worked out with and what a plateau has left of the rate; all of it goes
into checkpoints, and the rate is a function of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddp.job import Job, OptimizerSection, ScheduleSection
from ddp.noise.learning_rate import clamped_noise_scale, gain, rate_factor
from ddp.noise.noise_scale import Reading
from ddp.training.plateau import Plateau

ROUNDING = 1e-9  # of positions that are added up from parts of a step, in periods
_KEPT = ("first_batch_size", "first_steps_per_epoch", "position", "noise_scale")


def learning_rate(
    step: float,
    steps: float,
    peak: float,
    section: ScheduleSection,
    *,
    steps_per_epoch: float = math.nan,
    plateau: float = 1.0,
) -> float:
    """The rate for step `step` (1 for the first) of `steps`; between steps where a batch counts as part of one.

    It rises in a straight line, peak / warm-up in the first step and `peak` in the last of the warm-up. From there,
    with n the steps since:

        constant      peak
        step          peak * factor^floor(n / step_every)    He et al. 2016 (arXiv:1512.03385, section 4.1); torch's StepLR
        exponential   peak * factor^(n / decay)              torch's ExponentialLR, with decay = 1
        inverse_time  peak / (1 + n / decay)                 Robbins and Monro 1951; Bottou 2012 (Stochastic Gradient
                                                             Descent Tricks, section 5.2), decay = 1 / (peak lambda)
        cosine        along half a cosine to final_fraction * peak in the last step
                                                             Loshchilov and Hutter 2017 (arXiv:1608.03983, equation 5)
        plateau       peak * `plateau`, warm-up too          see `plateau.Plateau`; torch's ReduceLROnPlateau

    Beyond the last step cosine stays where it is.

    Args:
        steps_per_epoch: steps of the schedule in an epoch; needed where the section counts in epochs.
        plateau: how much of the peak is left.
    """
    warmup, peak = section.warmup(steps_per_epoch), peak * plateau
    if step < warmup:
        return peak * step / warmup
    top = max(warmup, 1.0)
    since = max(step - top, 0.0)
    periods = since / section.period(steps_per_epoch)
    match section.name:
        case "step":
            return peak * (section.factor or 1.0) ** math.floor(periods + ROUNDING)
        case "exponential":
            return peak * (section.factor or 1.0) ** periods
        case "inverse_time":
            return peak / (1.0 + periods)
        case "cosine":
            progress = min(since / (steps - top), 1.0) if steps > top else 0.0
            falling = (1 + math.cos(math.pi * progress)) / 2
            return peak * (section.final_fraction + (1 - section.final_fraction) * falling)
        case _:
            return peak


def momentum(step: float, section: OptimizerSection, steps_per_epoch: float = math.nan) -> float:
    """Of step `step`, as `learning_rate` counts it: `momentum` in the first, in a straight line to `final_momentum`.

    p_t = (1 - t/T) p_first + (t/T) p_final for the t steps before, up to T of them (Hinton et al. 2012, arXiv:1207.0580,
    appendix A.1, with 0.5 and 0.99). Adam's is beta_1, whose bias correction goes by its present value, as in torch's
    OneCycleLR. 0 where the optimizer has none.
    """
    first, final = section.first_momentum, section.final_momentum
    if final is None:
        return first
    epochs = section.momentum_epochs
    length = epochs * steps_per_epoch if epochs is not None else float(section.momentum_steps or 1)
    progress = min(max(step - 1.0, 0.0) / length, 1.0)
    return (1.0 - progress) * first + progress * final


@dataclass(slots=True)
class LearningRate:
    """The rate of each step of a run whose batch size may change.

    The schedule is counted in steps of the batch size that the run began with: with run.steps every step is one;
    with run.epochs a step is what it takes of an epoch, so that the schedule ends with the last epoch whatever the
    batch does. Under "adascale" it is counted in steps of the tuned batch size, of which a step is worth its gain; the
    run ends when they are done (Johnson et al. 2020, algorithm 1). What the job file gives in epochs is as many of these
    steps as an epoch had at first: with run.steps and a batch that changes, that is no longer the epoch of the data.
    """

    job: Job
    first_batch_size: int  # the global one that the run began with
    first_steps_per_epoch: int
    position: float = 0.0  # steps of the schedule that are done
    noise_scale: float = math.nan  # that the factor uses; NaN while there is none
    plateau: Plateau | None = None  # where the schedule is of that name

    @property
    def tuned_batch_size(self) -> int:
        """The global batch size at which optimizer.learning_rate holds."""
        return self.job.optimizer.tuned_batch_size or self.first_batch_size

    @property
    def length(self) -> float:
        """Steps of the schedule in the whole run."""
        if self.job.run.steps is not None:
            return self.job.run.steps
        return (self.job.run.epochs or 0) * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Steps of the schedule in an epoch, at the batch size that the run began with."""
        steps = self.first_steps_per_epoch
        return steps * self.first_batch_size / self.tuned_batch_size if self.counts_gains else steps

    @property
    def momentum(self) -> float:
        """Of the step that was last gone on by, see `momentum`."""
        return momentum(self.position, self.job.optimizer, self.steps_per_epoch)

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
        rate = learning_rate(
            *(self.position, self.length, self.job.optimizer.learning_rate, self.job.schedule),
            steps_per_epoch=self.steps_per_epoch,
            plateau=1.0 if self.plateau is None else self.plateau.scale,
        )
        return rate * self.factor(batch_size)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _KEPT}
        return state if self.plateau is None else {**state, "plateau": self.plateau.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, at whatever batch size the run now has; a plateau that is new begins afresh."""
        for name in _KEPT:
            setattr(self, name, state[name])
        if self.plateau is not None and "plateau" in state:
            self.plateau.load_state_dict(state["plateau"])

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
