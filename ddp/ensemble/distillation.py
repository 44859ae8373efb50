"""Distillation (Hinton, Vinyals and Dean 2015): a task like a student's own, but for a loss that follows an ensemble.

It is a custom task, `ddp.ensemble.distillation:Distillation`, whose options hold the student's own [task] table and the
teachers' checkpoints. So the student is a run like any other: all of it is in its job.toml, and it is recorded, saved,
resumed and evaluated by the commands there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from ddp.ensemble.combining import LOGITS, Ensemble, Member
from ddp.errors import UsageError
from ddp.job import CustomSection, Job, TaskSection, check_import
from ddp.tasks import load_task
from ddp.tasks.base import Batch, ClassDimension, Goal, Task, class_dimension_of, loss_and_metrics_of
from ddp.trained import job_of
from ddp.training.saved_model import read_saved_model

PACKAGE = "ddp.ensemble"  # to be allowed where such a job is trained
NAME = "ddp.ensemble.distillation:Distillation"
OPTIONAL = ("labels", "classes")  # what a task may have besides, for sampling and for the level of chance


def student_job(
    job: Job,
    members: Sequence[Path],
    *,
    weights: Sequence[float],
    temperature: float,
    hard_share: float,
    averaged: bool,
) -> Job:
    """`job` with the distillation of these checkpoints around its task."""
    options = {
        "task": job.task.model_dump(mode="json", exclude_none=True),
        "members": [str(path.absolute()) for path in members],
        "weights": list(weights),
        "temperature": temperature,
        "hard_share": hard_share,
        "averaged": averaged,
    }
    return job.model_copy(update={"task": CustomSection(name=NAME, options=options)})


class Distillation:
    """The student's task; its loss in training is `hard_share` of the task's own and else that of soft targets.

    In evaluation the loss is the task's own, so that it can be compared with other runs'.
    """

    loads_tasks = True  # `load_task` says which modules may be imported

    def __init__(
        self,
        *,
        task: Mapping[str, Any],
        members: Sequence[str],
        weights: Sequence[float] = (),
        temperature: float = 2.0,
        hard_share: float = 0.1,
        averaged: bool = False,
        allow_import: Sequence[str] = (),
    ) -> None:
        if not (temperature > 0 and 0 <= hard_share <= 1 and members):
            raise UsageError("task.options: members, temperature above 0 and hard_share from 0 to 1 are needed")
        self.task = _load(task, allow_import)
        self.goals: Mapping[str, Goal] = self.task.goals
        self.class_dimension: ClassDimension = class_dimension_of(self.task)
        self.temperature, self.hard_share = float(temperature), float(hard_share)
        self.teacher = Ensemble(
            [_teacher(Path(each), averaged, allow_import) for each in members],
            list(weights) or [1.0] * len(members),
            self.class_dimension,
            self.temperature,
        )
        self.teacher.requires_grad_(False).eval()
        if loss_and_metrics_of(self.task) is not None:
            self.loss_and_metrics = self._loss_and_metrics
        for name in OPTIONAL:
            if hasattr(self.task, name):
                setattr(self, name, getattr(self.task, name))

    def model(self) -> nn.Module:
        return self.task.model()

    def datasets(self) -> tuple[Any, Any]:
        return self.task.datasets()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not model.training:
            return self.task.loss(model, batch)
        heard: Any = Overheard(model)
        return self._mixed(self.task.loss(heard, batch), heard)

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return self.task.metrics(model, batch)

    def _loss_and_metrics(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        both = loss_and_metrics_of(self.task)
        assert both is not None
        if not model.training:
            return both(model, batch)
        heard: Any = Overheard(model)
        losses, metrics = both(heard, batch)
        return self._mixed(losses, heard), metrics

    def _mixed(self, hard: Tensor, heard: Overheard) -> Tensor:
        """alpha L + (1 - alpha) L_soft, as Hinton et al. weigh them; one value for each example."""
        with torch.no_grad():
            targets = self.teacher.to(hard.device)(*heard.args, **heard.kwargs)
        soft = soft_loss(logits_in(heard.output), logits_in(targets), self.class_dimension, self.temperature)
        return self.hard_share * hard + (1 - self.hard_share) * soft


def soft_loss(outputs: Tensor, targets: Tensor, dimension: ClassDimension, temperature: float) -> Tensor:
    """Of each example, (examples,): T^2 KL(teacher || student) at the temperature T, a mean over positions.

    T^2 keeps the gradient's size whatever the temperature (Hinton et al., section 2.1). Where there are no classes it is
    the mean squared difference.

    Args:
        outputs: the student's logits, (examples, ...), classes along `dimension`.
        targets: log-probabilities of the teacher at that temperature, of the same shape; of "binary" outputs its logits.
    """
    if dimension is None:
        return (outputs - targets).square().reshape(len(outputs), -1).mean(dim=1)
    student = outputs.to(targets.dtype) / temperature
    if dimension == "binary":  # two classes, yes and no, along a dimension of their own
        student, targets = (functional.logsigmoid(torch.stack([z, -z], dim=-1)) for z in (student, targets))
        dimension = -1
    student = torch.log_softmax(student, dim=dimension)
    divergence = functional.kl_div(student, targets, reduction="none", log_target=True).sum(dim=dimension)
    return temperature**2 * divergence.reshape(len(divergence), -1).mean(dim=1)


class Overheard:
    """A model that a task calls as itself, and whose call is noted: the teacher is to see the same inputs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        self.output = self._model(*args, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def logits_in(outputs: Any) -> Tensor:
    """A model's tensor, or the logits among several."""
    found = outputs[LOGITS] if isinstance(outputs, Mapping) and LOGITS in outputs else getattr(outputs, LOGITS, outputs)
    if not isinstance(found, Tensor):
        raise UsageError(f"distillation: the model answers with a {type(found).__name__}; a tensor is needed")
    return found


def _load(table: Mapping[str, Any], allow_import: Sequence[str]) -> Task:
    try:
        section = TypeAdapter(TaskSection).validate_python(table)
    except ValidationError as error:
        raise UsageError(f"task.options.task: {error.errors()[0]['msg']}") from None
    check_import(section, allow_import)
    return load_task(section, allow_import=allow_import)


def _teacher(path: Path, averaged: bool, allow_import: Sequence[str]) -> Member:
    job = job_of(path)
    check_import(job.task, allow_import)
    module = load_task(job.task, allow_import=allow_import).model()
    read_saved_model(path).load_into(module, averaged=averaged)
    return Member(module, job.precision)
