"""From a request to findings: members loaded and compared, measured together, averaged, and distilled into a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset

from ddp.ensemble.combining import Ensemble, Member
from ddp.ensemble.distillation import PACKAGE, student_job
from ddp.ensemble.findings import Findings, Row
from ddp.ensemble.joint import measure
from ddp.ensemble.same_data import check_same_data
from ddp.ensemble.soup import average_of, recompute_statistics
from ddp.errors import UsageError
from ddp.tasks.base import class_dimension_of
from ddp.trained import Trained, load_trained
from ddp.training.agreement import together
from ddp.training.place import Place
from ddp.training.plan import plan_run, size_of
from ddp.training.run import train_in
from ddp.training.stream import is_stream

if TYPE_CHECKING:
    from ddp.ensemble.command import Distil, Request

BATCH_SIZE = 64  # at least, of an evaluation


@dataclass(frozen=True, slots=True)
class Made:
    """An ensemble, and what it came to."""

    members: Sequence[Trained]
    weights: Sequence[float]
    findings: Findings


def evaluated(place: Place, request: Request) -> Made:
    """Load the members, measure them and what they are together. Collective."""
    members = load_trained(
        place, request.sources, runs=request.runs, averaged=request.averaged, allow_import=request.allow_import
    )
    together(lambda: check_same_data([(each.name, each.plan) for each in members]))
    weights = together(lambda: _weights(request.weights, len(members)))
    task, dataset = members[0].plan.task, _dataset(members[0], request.split)
    whole = Ensemble([_member(each) for each in members], weights, class_dimension_of(task))
    each, all_together = measure(place, task, whole, dataset, _batch_size(members[0]))
    findings = Findings(
        split=request.split,
        examples=size_of(dataset),
        world_size=place.topology.world_size,
        goals=task.goals,
        combined="outputs" if whole.class_dimension is None else "probabilities",
        weights=whole.weights,
        members=[Row(member.name, measured) for member, measured in zip(members, each, strict=True)],
        ensemble=Row("ensemble", all_together),
    )
    if request.average_weights:
        averaged = _averaged_network(place, members, weights)
        findings = replace(findings, soup=_alone(place, members[0], averaged, dataset, "average of weights"))
    return Made(members, weights, findings)


def with_student(place: Place, made: Made, student: Distil, request: Request) -> tuple[Findings, Path]:
    """Train the student as a run, and measure it beside the others; returns its run's directory, too. Collective."""
    first = made.members[0]
    own = together(
        lambda: plan_run(student.job, place.topology.world_size, place.topology.rank, allow_import=request.allow_import)
    )
    together(lambda: check_same_data([(first.name, first.plan), ("the student", own)]))
    job = student_job(
        student.job,
        [each.saved.path for each in made.members],
        weights=made.weights,
        temperature=student.temperature,
        hard_share=student.hard_share,
        averaged=request.averaged,
    )
    allowed = [*request.allow_import, PACKAGE]
    run_directory = train_in(replace(place, job=job), student.resume, allowed)
    (trained,) = load_trained(place, [run_directory], allow_import=allowed)
    row = _alone(place, first, trained.module, _dataset(first, request.split), f"student {trained.name}", trained.job)
    return replace(made.findings, student=row), run_directory


def _member(trained: Trained) -> Member:
    return Member(trained.module, trained.job.precision)


def _weights(asked: Sequence[float], count: int) -> list[float]:
    if asked and len(asked) != count:
        raise UsageError(f"--weights: {len(asked)} numbers for {count} members")
    total = sum(asked)
    return [weight / total for weight in asked] if asked else [1.0 / count] * count


def _dataset(trained: Trained, split: str) -> Dataset[Any]:
    return trained.plan.splits.training_sample if split == "training" else trained.plan.splits.validation


def _batch_size(trained: Trained) -> int:
    return max(BATCH_SIZE, trained.plan.batches.micro_batch_size)


def _alone(place: Place, like: Trained, module: nn.Module, dataset: Dataset[Any], name: str, job: Any = None) -> Row:
    """One network on the task and the data of `like`."""
    task = like.plan.task
    member = Member(module, (job or like.job).precision)
    _, measured = measure(place, task, Ensemble([member], [1.0], class_dimension_of(task)), dataset, _batch_size(like))
    return Row(name, measured)


def _averaged_network(place: Place, members: Sequence[Trained], weights: Sequence[float]) -> nn.Module:
    names = [each.name for each in members]
    module = together(lambda: average_of([each.module for each in members], weights, names))
    first = members[0]
    splits, model = first.plan.splits, Member(module, first.job.precision)
    recompute_statistics(
        module,
        lambda batch: first.plan.task.loss(model, batch),
        splits.training_sample if is_stream(splits.training) else splits.training,
        batch_size=_batch_size(first),
        device=place.device,
        asked_to_stop=lambda: place.stop.asked,
    )
    return module
