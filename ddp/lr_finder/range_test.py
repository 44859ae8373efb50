"""The learning-rate range test: the session's own training steps at rates that rise by equal factors, on all ranks.

Smith 2017 (arXiv:1506.01186, section 3.3) raises the rate in a straight line; by factors, as here, a test covers the
eight orders of magnitude that nobody knows the rate within. Each step is that of a run, with its exchange between
ranks, so that all ranks see the same losses and decide alike without another collective.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from ddp.errors import DivergedError, StoppedError, UsageError
from ddp.lr_finder.curve import (
    Baseline,
    BlowUpWatch,
    Curve,
    End,
    continued_rates,
    exponential_rates,
    features,
    zoomed_range,
)
from ddp.lr_finder.finding import Finding, RangePass, rate_text
from ddp.lr_finder.restoring import tried_out
from ddp.noise.noise_scale import Reading
from ddp.training.schedules import LearningRate
from ddp.training.session import Session
from ddp.training.trainer import Trainer

LOW, HIGH, HIGHEST = 1e-7, 10.0, 1e3
STEPS, FEWEST_STEPS, MOST_STEPS = 100, 20, 100_000
BEYOND = 5.0  # times a zoomed pass's end, to which it goes on while the loss has not blown up

logger = logging.getLogger("ddp.lr_finder")


def find_learning_rate(
    here: Session | Trainer, *, low: float = LOW, high: float | None = None, steps: int = STEPS, zoom: bool = True
) -> Finding:
    """Test the learning rates from `low` up, and once more and finer where the loss moves. Collective.

    Everything is restored exactly before it returns: parameters, buffers, optimizer, generators, position in the data.
    The schedule takes no part, neither does its warm-up; a batch that adapts itself stays as it stands.

    Args:
        here: a session, or a trainer between two of its steps.
        low, high: values of optimizer.learning_rate. Without `high` the test has `steps` steps to 10, and
            goes on as it went to 1,000 while the loss has not blown up.
        steps: of each pass; at least 20.
        zoom: take the second pass.

    Raises:
        UsageError: the range or the number of steps makes no sense.
        StoppedError: a rank was asked to stop; on all of them.
    """
    trainer = here if isinstance(here, Trainer) else here.trainer
    end = HIGH if high is None else high
    check_range(low, end, steps)
    highest = HIGHEST if high is None else high
    coarse = _take_pass(trainer, low, end, highest, steps, None)
    passes = [coarse]
    if zoom and coarse.features.kind in ("found", "open"):
        near, far = zoomed_range(coarse.features, coarse.curve.rates[-1], low, highest)
        passes.append(_take_pass(trainer, near, far, min(BEYOND * far, highest), steps, coarse))
    return Finding(
        tuple(passes),
        optimizer=trainer.job.optimizer.name,
        learning_rate=trainer.job.optimizer.learning_rate,
        global_batch_size=trainer.plan.global_batch_size,
        batch_factor=trainer.course.rate.factor(trainer.plan.global_batch_size),
        epochs=max(len(each.curve.losses) for each in passes) / (trainer.plan.steps_per_epoch or math.inf),
    )


def check_range(low: float, high: float, steps: int) -> None:
    """
    Raises:
        UsageError: no test can be made of it.
    """
    if not 0 < low < high < math.inf:
        raise UsageError(
            f"find-lr: rates from {low:g} to {high:g}: two numbers above 0 are needed, the lower one first"
        )
    if not FEWEST_STEPS <= steps <= MOST_STEPS:
        raise UsageError(f"find-lr: {steps} steps: {FEWEST_STEPS} to {MOST_STEPS:,} can be taken")


@dataclass(slots=True)
class _GivenRates(LearningRate):
    """Those of a test in place of a schedule, by the job's rule for the batch size; after the last it stays."""

    given: Sequence[float] = ()
    taken: int = 0

    def advance(self, batch_size: int, steps_per_epoch: float, reading: Reading | None) -> float:
        rate = self.given[min(self.taken, len(self.given) - 1)]
        self.taken += 1
        return rate * self.factor(batch_size)


def _take_pass(
    trainer: Trainer, low: float, high: float, highest: float, steps: int, before: RangePass | None
) -> RangePass:
    """From `low` to `high`, and on to `highest` while the loss stays down; `before` knows the loss of the untouched model."""
    rates = continued_rates(exponential_rates(low, high, steps), highest)
    baseline = None if before is None else before.features.baseline
    with tried_out(trainer):
        curve = _curve(trainer, rates, steps, baseline)
    found = RangePass(low, high, steps, curve, features(curve, steps, baseline))
    logger.info(
        "%s pass: %d steps from %s on, %s",
        *("coarse" if before is None else "zoomed", len(curve.rates), rate_text(low), found.features.kind),
    )
    return found


def _curve(trainer: Trainer, rates: Sequence[float], steps: int, baseline: Baseline | None) -> Curve:
    trainer.course.rate = _with_rates(trainer.course.rate, rates)
    watch = BlowUpWatch(steps, baseline)
    losses: list[float] = []
    end: End = "range"
    try:
        for loss in _losses(trainer, len(rates) + 1):
            losses.append(loss)
            if watch.observe(loss):
                end = "blown up"
                break
    except DivergedError:
        end = "not finite"
    return Curve(tuple(rates[: max(len(losses) - 1, 0)]), tuple(losses), end)


def _losses(trainer: Trainer, count: int) -> Iterator[float]:
    """Of so many steps, over all ranks: from their rows, so the same on each."""
    data = trainer.course.batches(
        trainer.splits.training,
        trainer.rank,
        lambda ahead: trainer.watch.least_parts(trainer.step_count + 1 + ahead),
        trainer.loader,
    )
    for _ in range(count):
        rows = trainer.step(data)
        if any(row.stop for row in rows):
            raise StoppedError("find-lr: stopped by a signal; nothing has changed: run it again")
        yield sum(row.loss_sum for row in rows) / sum(row.examples for row in rows)


def _with_rates(rate: LearningRate, given: Sequence[float]) -> _GivenRates:
    return _GivenRates(**{each.name: getattr(rate, each.name) for each in fields(LearningRate)}, given=given)
