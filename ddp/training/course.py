"""Where a run stands in its data and on its schedule, and how it goes on: the next batch, its rate, its size.

The position is an epoch and the examples of it that were taken, so that the batch size may change at any step, and
with it the number of ranks from one part of a run to the next. All of it is in checkpoints and alike on all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import Dataset

from ddp.job import UNITS, Job
from ddp.noise.noise_scale import Reading
from ddp.tasks.base import Batch, Goal
from ddp.telemetry.records import BatchChange
from ddp.training.batch_size import BatchSizeController, Limits
from ddp.training.data import BatchPlan, StepData, batches, fetch_step, fetcher
from ddp.training.loader import LeastParts, Loader
from ddp.training.plateau import Plateau
from ddp.training.sampling import Sampler, Uniform
from ddp.training.schedules import LearningRate
from ddp.training.stream import Stream
from ddp.transport.row import StepRow

logger = logging.getLogger("ddp.training")


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run will be, as `RunInfo` says it: 0 for what the batch leaves open."""

    steps: int
    steps_per_epoch: int
    epochs: float


@dataclass
class Course:
    """`plan` is how the next step is dealt out; `controller` is there where the batch adapts itself.

    `sampler` says which examples an epoch takes; where `stream` is there they are that stream's, as they come.
    """

    plan: BatchPlan
    rate: LearningRate
    controller: BatchSizeController | None = None
    epoch: int = 0
    position: int = 0  # examples of the epoch that are taken
    sampler: Sampler = field(default_factory=Uniform)
    stream: Stream | None = None

    @property
    def epochs_done(self) -> float:
        """Fractional. Of a stream that does not say how long it is, passes, with all that the run will take as the next."""
        if not self.plan.is_open:
            return self.epoch + self.position / self.plan.examples
        planned = max(self.rate.job.run.steps or 0, 1) * self.rate.first_batch_size
        return self.epoch + min(self.position / planned, 1.0)

    @property
    def training_examples(self) -> int | None:
        """None where the training set is a stream."""
        return None if self.stream is not None else self.plan.examples

    @property
    def sampling(self) -> str:
        """Whose noise scale is measured, for the readers of the run."""
        return self.sampler.name if self.stream is None else "stream"

    @property
    def length(self) -> Length:
        """Of the whole run, if the batch stays as it is now, unless it is to adapt itself."""
        run, per_epoch = self.rate.job.run, 0 if self.controller is not None else self.plan.steps_per_epoch
        if self.rate.counts_gains and (per_epoch == 0 or self.rate.tuned_batch_size != self.plan.global_batch_size):
            return Length(0, per_epoch, 0.0)
        steps = run.steps or (run.epochs or 0) * per_epoch
        return Length(steps, per_epoch, float(run.epochs or 0) or (steps / per_epoch if per_epoch else 0.0))

    @property
    def follows_readings(self) -> bool:
        """Whether the rates depend on the noise scale and on nothing that a clock has a say in, as the size may."""
        return self.controller is None and self.rate.follows_readings

    def is_over(self, step_count: int) -> bool:
        """Whether the run ends after so many steps, where it stands now."""
        return self.rate.is_over(step_count, self.epoch)

    def has_finished_epochs(self, every: int) -> bool:
        """Whether the last step was an epoch's last, and so many epochs are full again."""
        return self.position == 0 and self.epoch > 0 and self.epoch % every == 0

    def batches(
        self,
        dataset: Dataset[Any],
        rank: int,
        least_parts: LeastParts = lambda ahead: 1,
        loader: Loader | None = None,
    ) -> Iterator[StepData]:
        """Without end: each next step from where the course then stands, by the plan that it then has.

        `least_parts` is asked for the fewest micro-batches that the step so many ahead is to have. A `loader` fetches
        them ahead; it has the data set already.
        """
        while self.stream is not None:
            yield self.stream.step(self.plan, self.position, least_parts(0))
        while loader is not None:
            yield loader.step(self.plan, self.epoch, self.position, least_parts)
        fetch = fetcher(dataset)
        while True:
            order = self.sampler.order(self.plan, self.epoch)
            yield fetch_step(fetch, order, self.plan, rank, self.position, least_parts(0))

    def first_micro_batch(self, dataset: Dataset[Any], rank: int) -> Batch:
        """One like those to come, which come all the same. Collective where it is a stream's."""
        if self.stream is not None:
            return self.stream.first(self.plan)
        return next(batches(dataset, self.plan, rank, 0)).micro_batches[0]

    def take(self, data: StepData) -> None:
        """Go on by this step's examples."""
        self._go_to(data.stop)

    def learning_rate(self, data: StepData, reading: Reading | None) -> float:
        """The rate of this step; called once in each.

        `reading` is the headline noise scale, this step included; None where it is not measured.
        """
        steps_per_epoch = self.plan.steps_per_epoch
        if self.controller is not None:
            steps_per_epoch = self.plan.examples / data.global_examples
        return self.rate.advance(self.plan.global_batch_size, steps_per_epoch, reading)

    @property
    def momentum(self) -> float:
        """Of this step, once its learning rate was asked for; 0 where the optimizer has none."""
        return self.rate.momentum

    def take_evaluation(self, step_count: int, value: float) -> str:
        """The metric that a plateau follows, evaluated after this step when that was due; what comes of it, in words."""
        plateau = self.rate.plateau
        if plateau is None or not plateau.observe(step_count, value):
            return ""
        rate = plateau.peak * plateau.scale
        return f"nothing gained in {plateau.section.patience + 1} evaluations: the learning rate falls to {rate:.3g}"

    def adapt(
        self, data: StepData, rows: Sequence[StepRow], reading: Reading | None, step_count: int
    ) -> BatchChange | None:
        """Choose the size of the next step by the step that was just taken; what changed, if anything did."""
        if self.controller is None:
            return None
        alone = self.plan.world_size == 1  # then a step may be split for the noise scale
        micro_batches = len(data.micro_batches) if alone else self.plan.passes(data.global_examples)
        change = self.controller.observe(data.global_examples, micro_batches, rows, reading)
        self._follow(self.controller)
        if change is None:
            return None
        factor = self.rate.factor(change.after) / self.rate.factor(change.before)
        return BatchChange(
            step_count, self.epochs_done, time.time(), change.before, change.after, factor, change.reason
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, but for a noise scale that is not known yet (NaN)."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "world_size": self.plan.world_size,
            "seed": self.plan.seed,
            "sampling": self.sampling,
            "rate": self.rate.state_dict(),
            "batch": None if self.controller is None else self.controller.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """By a copy that takes it; what examples are drawn from is not copied."""
        trial = copy(self)
        trial.rate, trial.controller = deepcopy(self.rate), deepcopy(self.controller)
        trial.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, with the ranks that there are now and, unless it adapts itself, the job's batch.

        Where an epoch has fewer examples left than there are ranks now, it ends there.
        """
        epoch, position = state["epoch"], state["position"]
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position < self.plan.examples:
            raise ValueError(f"epoch {epoch!r}, example {position!r} of {self.plan.examples}")
        if position and state["seed"] != self.plan.seed:
            raise ValueError(
                f"run.seed {self.plan.seed} gives another order of the epoch than {state['seed']}, in its middle"
            )
        if position and (before := state.get("sampling", "uniform")) != self.sampling:
            raise ValueError(f"sampling is {self.sampling}, in the middle of an epoch whose sampling was {before}")
        self.epoch = epoch
        self._go_to(position)
        self.rate.load_state_dict(state["rate"])
        if self.controller is not None and state["batch"] is not None:
            self.controller.load_state_dict(state["batch"], same_ranks=state["world_size"] == self.plan.world_size)
            self._follow(self.controller)

    def _go_to(self, position: int) -> None:
        self.epoch, self.position = self.plan.after(self.epoch, position)

    def _follow(self, controller: BatchSizeController) -> None:
        size, micro = controller.size, controller.micro_batch_size
        if (size, micro) != (self.plan.global_batch_size, self.plan.micro_batch_size):
            self.plan = replace(self.plan, global_batch_size=size, micro_batch_size=micro)


def begin_course(
    job: Job,
    plan: BatchPlan,
    *,
    batch_statistics: bool = False,
    goal: Goal = "min",
    sampler: Sampler | None = None,
    stream: Stream | None = None,
) -> Course:
    """The course of a new run; a resumed one then loads its state.

    Args:
        batch_statistics: a micro-batch of another size gives another gradient.
        goal: of the metric that a plateau follows.
        sampler: uniform where left out.
        stream: the training set, where it is one.
    """
    sampler = sampler or Uniform()
    rate = LearningRate(job, first_batch_size=plan.global_batch_size, first_steps_per_epoch=plan.steps_per_epoch)
    if job.schedule.name == "plateau":
        rate.plateau = Plateau(job.schedule, goal, job.optimizer.learning_rate)
    if not job.batch.adapts:
        return Course(plan, rate, sampler=sampler, stream=stream)
    smallest, largest = job.batch.limits(plan.world_size, plan.examples)
    open_micro_batches = 1 if job.batch.micro_batch_size is not None else -(-UNITS // plan.world_size)
    limits = Limits(
        *(smallest, largest, plan.world_size, job.batch.micro_batch_size, open_micro_batches),
        may_split=not batch_statistics,
    )
    return Course(plan, rate, BatchSizeController(limits, plan.global_batch_size), sampler=sampler, stream=stream)


def say_rate(course: Course) -> None:
    """Where the run's batch is not the one that its learning rate was tuned at, say what the rule makes of that."""
    section, tuned, batch = course.rate.job.optimizer, course.rate.tuned_batch_size, course.plan.global_batch_size
    if tuned == batch:
        return
    factor, known = course.rate.factor(batch), course.rate.noise_scale
    how = f"by the rule {section.rule}"
    if section.rule == "noise_scale" and not known >= 0:
        how = "by the square root until a noise scale is resolved, then by the rule noise_scale"
    elif section.rule == "adascale":
        how = f"and its schedule by the gain of adascale, {course.rate.length:.0f} steps of {tuned} in all"
    logger.info("a learning rate tuned at %d examples a step is scaled by %.3g for %d, %s", tuned, factor, batch, how)
