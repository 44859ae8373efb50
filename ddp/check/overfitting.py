"""Can the model fit 20 examples, without anything that holds it back? Where it cannot, there is a bug before all tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ddp.check.chance import ADVICE_NOT_FINITE
from ddp.check.determinism import without_dropout
from ddp.check.subject import Subject
from ddp.check.threads import useful_threads
from ddp.check.verdicts import Verdict
from ddp.tasks.base import Batch
from ddp.training.random_state import preserved_random_state, seed_rank

OVERFIT = "20 examples overfitted"
FEW = 20
RATES = (3e-3, 1e-2, 3e-4)  # Adam's, one after the other
STEPS = 300  # with each rate
ZERO, HIGH = 0.02, 0.1  # of the loss at the start: up to here it counts as zero, and above there as not learned


@dataclass(frozen=True)
class Overfitted:
    """A model that was trained on a few examples, and the losses on the way; `ran_out` where time ended it."""

    model: nn.Module
    batch: Batch
    start: float
    best: float
    steps: int
    ran_out: bool = False

    @property
    def is_there(self) -> bool:
        """Whether the loss came next to zero."""
        return self.share <= ZERO

    @property
    def share(self) -> float:
        """Of the loss at the start that is left; nothing of one that has no bottom at zero."""
        return max(self.best, 0.0) / self.start if self.start > 0 else math.nan


def overfit(subject: Subject) -> Overfitted:
    """Train a copy of the fresh model on 20 examples with Adam until the loss is next to zero, for 900 steps, or until time is over."""
    batch = subject.fetch(subject.examples(FEW))
    model, start, best, steps = without_dropout(subject.initial), math.nan, math.inf, 0
    is_over = subject.patience()
    with preserved_random_state(), useful_threads(lambda: subject.plain_task.loss(model, batch)):
        for rate in RATES:
            attempt = without_dropout(subject.initial)
            for loss in _losses(subject, attempt, batch, rate):
                start = loss if math.isnan(start) else start
                if loss < best:
                    best = loss
                    model = attempt
                steps += 1
                if not math.isfinite(loss) or best <= ZERO * start or is_over():
                    break
            if best <= ZERO * start or is_over():
                break
    return Overfitted(model, batch, start, best, steps, ran_out=is_over())


def overfit_verdict(done: Overfitted, examples: int) -> Verdict:
    """What the attempt shows."""
    figures = {"start": done.start, "best": done.best, "steps": done.steps, "examples": examples}
    found = f"loss {done.start:.4g} -> {done.best:.2g} on {examples} examples in {done.steps} steps"
    if not (math.isfinite(done.start) and math.isfinite(done.best)):
        return Verdict(OVERFIT, "failed", found, ADVICE_NOT_FINITE, figures)
    if done.start <= 0:
        return Verdict(
            OVERFIT, "skipped", f"{found}: a loss that starts at or below zero has its bottom elsewhere", "", figures
        )
    if done.is_there:
        return Verdict(OVERFIT, "ok", found, _ADVICE_RANDOM, figures)
    if done.ran_out:
        return Verdict(OVERFIT, "warning", f"{found}, and then time was over", "give it more (--seconds)", figures)
    status = "failed" if not done.share <= HIGH else "warning"
    return Verdict(OVERFIT, status, found, _ADVICE_NOT_LEARNED if status == "failed" else _ADVICE_FLOOR, figures)


_ADVICE_RANDOM = (
    "necessary, not sufficient: a model overfits 20 examples of random features or shuffled labels as well, so look at "
    "inputs and labels with your own eyes, too"
)
_ADVICE_NOT_LEARNED = (
    "a bug before it is a matter of tuning: labels that do not belong to the inputs, a loss that does not reach all parameters, "
    "saturated units, too small a model"
)
_ADVICE_FLOOR = "not zero: equal inputs with different labels, a loss with a floor above zero, or too few steps"


def _losses(subject: Subject, model: nn.Module, batch: Batch, rate: float) -> Iterator[float]:
    """The loss before each of Adam's steps."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(STEPS):
        seed_rank(subject.job.run.seed, subject.rank)
        loss = subject.plain_task.loss(model, batch).mean()
        yield float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
