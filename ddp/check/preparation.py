"""From a session of the job to what is checked: its model before and after a few steps of training, as the job has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from ddp.check.ranks import COMPARED, Trained, equal_norms, example_hashes
from ddp.check.subject import Subject
from ddp.errors import DivergedError, ReplicaError, UsageError
from ddp.job import Job, without_regularisation
from ddp.tasks import load_task
from ddp.tasks.base import Task
from ddp.training.agreement import together
from ddp.training.data import StepData, split
from ddp.training.finite import sample_of_stream
from ddp.training.initialisation import freeze_
from ddp.training.random_state import preserved_random_state, seed_rank
from ddp.training.session import Session
from ddp.training.stream import is_stream

HEAD = 512  # examples of a stream that are looked at


def prepare(
    session: Session, *, steps: int, seconds: float = 60.0, allow_import: Sequence[str] = ()
) -> tuple[Subject, Trained]:
    """Train for a few steps, and load the task without its regularisation. Collective.

    Args:
        seconds: that each of the long checks may take.
    """
    job, plan, trainer = session.job, session.plan, session.trainer
    plain_job = without_regularisation(job)
    plain_task: Task = plan.task
    training = plan.splits.training
    if plain_job.task != job.task:
        plain_task = together(lambda: load_task(plain_job.task, allow_import=allow_import))
    if plain_task is not plan.task or is_stream(training):  # a stream stands where the run has come to
        training = together(lambda: by_number(job, plain_task))
    module = trainer.model.module
    initial = together(lambda: plain_copy(job, plan.task, module))
    trained = _train(session, steps)
    subject = Subject(
        *(job, plain_job, plan.task, plain_task),
        initial=initial,
        model=together(lambda: plain_copy(job, plan.task, module)),
        training=training,
        decay=_decay(session, module),
        device=session.device,
        rank=session.rank,
        world_size=session.world_size,
        asked_to_stop=lambda: session.stop.asked,
        seconds=seconds,
    )
    return subject, trained


def by_number(job: Job, task: Task) -> Dataset[Any]:
    """The task's training set made once more, on all ranks alike; of a stream the beginning.

    Raises:
        UsageError: the stream has no examples.
    """
    with preserved_random_state():
        seed_rank(job.run.seed, 0)
        training, _ = task.datasets()
    return sample_of_stream(training, HEAD) if is_stream(training) else training


def plain_copy(job: Job, task: Task, module: nn.Module) -> nn.Module:
    """The model as the task makes it, with the state of `module`.

    That may have been compiled, compute activations again, or normalise over all ranks: no copy of it could be called by
    one rank alone.

    Raises:
        UsageError: the task made another model this time.
    """
    with preserved_random_state():
        seed_rank(job.run.seed, 0)
        result = task.model().to(next(module.parameters()).device)
    try:
        result.load_state_dict(module.state_dict())
    except RuntimeError as error:
        raise UsageError(f"task: model() made another model the second time: {error}") from None
    freeze_(result, job.initialisation.freeze)
    return result


def _train(session: Session, steps: int) -> Trained:
    """Some steps of the job, on all its ranks; what was fetched on this one is looked at on its way."""
    trainer = session.trainer
    fetched: list[str] = []
    norms: list[list[float]] = []
    data = _watched(session.steps(), fetched)
    while len(norms) < steps and not trainer.course.is_over(trainer.step_count):
        try:
            rows = trainer.step(data)
        except (DivergedError, ReplicaError) as error:  # on all ranks alike
            return Trained(len(norms), tuple(fetched), equal_norms(norms), fault=str(error))
        norms.append([row.own_squared_norm for row in rows])
        if any(bool(row.stop) for row in rows):
            break
    return Trained(len(norms), tuple(fetched), equal_norms(norms))


def _watched(steps: Iterator[StepData], fetched: list[str]) -> Iterator[StepData]:
    """The same steps; of the first examples a hash is noted."""
    for step, data in enumerate(steps):
        for part, batch in zip(split(range(data.examples), len(data.micro_batches)), data.micro_batches, strict=True):
            if len(fetched) < 4 * COMPARED:
                fetched += [f"{step}:{each}" for each in example_hashes(batch, len(part))]
        yield data


def _decay(session: Session, module: nn.Module) -> dict[str, float]:
    """As the optimizer has it, which may leave some parameters out."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: float(group["weight_decay"])
        for group in session.trainer.optimizer.param_groups
        for parameter in group["params"]
        if group.get("weight_decay") and id(parameter) in names
    }
