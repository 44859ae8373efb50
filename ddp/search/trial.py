"""One trial: a light training loop in one process, without ranks or run directory.

It follows the job in everything that the result depends on (task, optimizer, order of the data, mean over the
batch's examples, clipping, warm-up) and measures what a search wants to know: the training loss on a fixed subset
against the step, validation at the targets, time, memory, and the noise scale on the way.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

from ddp.errors import UsageError
from ddp.search.branch_point import restore_branch_point
from ddp.search.curve import next_look, steps_to_targets, value_at
from ddp.search.gradient_noise import average_noise_scale
from ddp.search.request import Trial
from ddp.search.store import StoppedBecause, TrialResult
from ddp.search.training_step import TrainingStep
from ddp.search.workload import SubsetLoss, Workload, make_model
from ddp.training.evaluation import evaluate
from ddp.training.random_state import preserved_random_state, seed_rank

DIVERGED = 10.0  # times the first loss


def run_trial(workload: Workload, trial: Trial, hopeless_steps: Callable[[], float] | None = None) -> TrialResult:
    """Train until all targets are reached, the loss diverges, the budget is used up, or it is hopeless.

    Args:
        hopeless_steps: asked at each look, for what becomes known meanwhile; the trial's own where left out.
    """
    started = time.perf_counter()
    run = _Run(workload, trial, hopeless_steps or (lambda: trial.hopeless_steps))
    because, steps = run.to_the_end()
    reached = steps_to_targets(run.curve, trial.targets) if because != "diverged" else run.reached()
    job, batch_size = workload.sweep.job, trial.batch_size
    return TrialResult(
        optimizer=job.optimizer.name,
        batch_size=batch_size,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        method=trial.method,
        targets=trial.targets,
        steps_to_target=reached,
        examples_to_target=tuple(steps * batch_size for steps in reached),
        validation_loss_at_target=tuple(value_at(steps, run.validation_losses) for steps in reached),
        validation_metric_at_target=tuple(value_at(steps, run.validation_metrics) for steps in reached),
        seconds=time.perf_counter() - started,
        seconds_per_step=run.step.median_seconds(),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        diverged=because == "diverged",
        stopped_because=because,
        curve=tuple(run.curve),
        noise_plain=tuple(average_noise_scale(run.step.plain, steps, batch_size) for steps in reached),
        noise_preconditioned=tuple(
            average_noise_scale(run.step.preconditioned, steps, batch_size) for steps in reached
        ),
        steps=steps,
        multiple=trial.multiple,
        origin=trial.origin,
    )


class _Run:
    """The loop: steps, looks at the loss on the subset, and the decision to stop."""

    def __init__(self, workload: Workload, trial: Trial, hopeless_steps: Callable[[], float]) -> None:
        job = workload.sweep.job
        self._workload, self._trial, self._hopeless_steps = workload, trial, hopeless_steps
        seed_rank(job.run.seed + trial.seed, 0)
        self._model = make_model(workload, job.run.seed + trial.seed).to(workload.device)
        self.step = TrainingStep(workload, trial, self._model)
        if trial.origin:
            restore_branch_point(Path(trial.origin), self._model, self.step)
        self._subset = SubsetLoss(workload, self._model, self.step.unit_examples)
        self.curve: list[tuple[int, float]] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.validation_metrics: list[tuple[int, float]] = []

    def to_the_end(self) -> tuple[StoppedBecause, int]:
        """Why it stopped and after how many steps."""
        step, look, because = 0, 0, self._look(0)
        while because is None:
            look = min(next_look(look), self._trial.maximum_steps)
            while step < look:
                step += 1
                if not self.step.take(step):
                    return "diverged", step
            because = self._look(step)
        return because, step

    def reached(self) -> tuple[float, ...]:
        """Steps to each target as far as is known."""
        finite = [(step, loss) for step, loss in self.curve if math.isfinite(loss)]
        return steps_to_targets(finite, self._trial.targets)

    def _look(self, step: int) -> StoppedBecause | None:
        with preserved_random_state():
            loss = self._subset.loss()
        if loss <= 0:
            raise UsageError(f"task: the training loss is {loss:g} after step {step}; targets are for losses above 0")
        self.curve.append((step, loss))
        if not math.isfinite(loss) or loss > DIVERGED * self.curve[0][1]:
            return "diverged"
        if self._trial.targets and loss <= 1.25 * self._trial.targets[0]:
            self._validate_near_a_target(step, loss)
            if not any(map(math.isnan, self.reached())):
                return "targets"
        if step >= self._trial.maximum_steps:
            return "budget"
        return "hopeless" if step > self._hopeless_steps() else None

    def _validate_near_a_target(self, step: int, loss: float) -> None:
        """Looks around a crossing are enough: values at the target are read off between them."""
        if not any(0.85 * target <= loss <= 1.15 * target for target in self._trial.targets):
            return
        with preserved_random_state():
            found = evaluate(
                self._workload.task,
                self._model,
                self._workload.validation,
                rank=0,
                world_size=1,
                batch_size=self._workload.sweep.micro_batch_size,
                device=self._workload.device,
            )
        assert found is not None
        self.validation_losses.append((step, found.loss))
        metric = self._workload.sweep.job.evaluation.metric
        self.validation_metrics.append((step, {"loss": found.loss, **found.metrics}.get(metric, math.nan)))
