"""Does regularisation regularise? Stronger, each kind has to raise the loss of a model that fits its 20 examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ddp.check.determinism import without_dropout
from ddp.check.gradients import first_line
from ddp.check.overfitting import Overfitted
from ddp.check.subject import Subject
from ddp.check.threads import useful_threads
from ddp.check.verdicts import Verdict, several
from ddp.errors import DdpError
from ddp.job import regularisers, with_regulariser
from ddp.tasks import load_task
from ddp.tasks.base import Task
from ddp.training.optimizers import build_optimizer
from ddp.training.random_state import preserved_random_state, seed_rank

RAISES = "stronger regularisation"
DECAY, RATE, STEPS = 100.0, 1e-3, 20  # plain weight decay then leaves 0.9^20 = 12 % of a weight
STRONG_DROPOUT, STRONG_SMOOTHING = 0.5, 0.2
DRAWS = 5  # of dropout, averaged
SHRUNK = 0.999  # of the weights' norm without decay


@dataclass(frozen=True, slots=True)
class Effect:
    """Losses without one kind of regularisation and with much of it; `norm` is the weights' with it over that without."""

    name: str
    off: float
    strong: float
    norm: float = 1.0

    @property
    def is_seen(self) -> bool:
        """Where the best weights are small, decay lowers the loss with them: it has its effect all the same."""
        return self.strong > self.off or self.norm < SHRUNK

    def in_words(self) -> str:
        norm = f" (weights at {self.norm:.0%})" if self.norm != 1.0 else ""
        return f"{self.name} {self.off:.2g} -> {self.strong:.2g}{norm}"


def check_stronger_regularisation(subject: Subject, done: Overfitted, allow_import: Sequence[str]) -> Verdict:
    """Weight decay through the job's optimizer, dropout modules, and the task's label smoothing: each by itself."""
    with useful_threads(lambda: subject.plain_task.loss(done.model, done.batch)):
        return _verdict(*_effects(subject, done, allow_import))


def _effects(subject: Subject, done: Overfitted, allow_import: Sequence[str]) -> tuple[list[Effect], str]:
    """What each kind does, and what could not be tried."""
    effects, not_tried = [_decay(subject, done)], ""
    if any(isinstance(module, _DropoutNd) for module in done.model.modules()):
        effects.append(_dropout(subject, done))
    for regulariser in regularisers(subject.plain_job):
        if regulariser.key.endswith(".label_smoothing"):
            try:
                strong = with_regulariser(subject.plain_job, regulariser.key, STRONG_SMOOTHING)
                task = load_task(strong.task, allow_import=allow_import)
            except (DdpError, ValidationError) as error:
                not_tried = f"; {regulariser.key} was not tried: {first_line(error)}"
            else:
                effects.append(_smoothing(subject, done, task))
    return effects, not_tried


def _verdict(effects: Sequence[Effect], not_tried: str) -> Verdict:
    figures = {each.name: {"off": each.off, "strong": each.strong, "norm": each.norm} for each in effects}
    found = f"loss of the overfitted examples: {', '.join(each.in_words() for each in effects)}{not_tried}"
    if idle := [each.name for each in effects if not each.is_seen]:
        return Verdict(RAISES, "warning", f"{several(idle)} does nothing; {found}", _ADVICE, figures)
    return Verdict(RAISES, "ok", found, "", figures)


_ADVICE = "look whether the optimizer gets these parameters, and whether model and loss use the setting"


def _decay(subject: Subject, done: Overfitted) -> Effect:
    """After some steps of the job's optimizer without and with much of it."""

    def trained(decay: float) -> tuple[float, float]:
        model = copy.deepcopy(done.model)
        plain = {"weight_decay": decay, "learning_rate": RATE, "groups": []}  # groups may have a decay of their own
        section = subject.job.optimizer.model_copy(update=plain)
        optimizer = build_optimizer(section, model.parameters())
        for _ in range(STEPS):
            optimizer.zero_grad()
            _loss(subject, subject.plain_task, model, done, 0).backward()
            optimizer.step()
        with torch.no_grad():
            squares = sum(float(each.square().sum()) for each in model.parameters() if each.requires_grad)
        return float(_loss(subject, subject.plain_task, model, done, 0).detach()), math.sqrt(squares)

    (off, norm), (strong, decayed_norm) = trained(0.0), trained(DECAY)
    return Effect("weight decay", off, strong, decayed_norm / norm if norm else 1.0)


def _dropout(subject: Subject, done: Overfitted) -> Effect:
    model = without_dropout(done.model)
    off = _mean_loss(subject, subject.plain_task, model, done)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = STRONG_DROPOUT
    return Effect("dropout", off, _mean_loss(subject, subject.plain_task, model, done))


def _smoothing(subject: Subject, done: Overfitted, task: Task) -> Effect:
    """`task` is the job's with much label smoothing."""
    model = without_dropout(done.model)
    off = _mean_loss(subject, subject.plain_task, model, done)
    return Effect("label smoothing", off, _mean_loss(subject, task, model, done))


def _mean_loss(subject: Subject, task: Task, model: nn.Module, done: Overfitted) -> float:
    with torch.no_grad():
        return fmean(float(_loss(subject, task, model, done, draw)) for draw in range(DRAWS))


def _loss(subject: Subject, task: Task, model: nn.Module, done: Overfitted, draw: int) -> torch.Tensor:
    with preserved_random_state():
        seed_rank(subject.job.run.seed, draw)
        return task.loss(model, done.batch).mean()
