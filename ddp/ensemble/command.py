"""The `ensemble` command: who the members are, and what is made of them.

Imported by every command, so torch is loaded when there is something to evaluate and not before.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ddp import outcome
from ddp.command_options import AllowImport, AsJson
from ddp.ensemble.sweep_results import best_runs
from ddp.errors import UsageError
from ddp.job import Job, check_exposure, check_import, load_job
from ddp.ranked_command import print_on_rank_0, ranked
from ddp.topology import Topology
from ddp.trained import job_of, without_transport

Split = Literal["validation", "training"]


@dataclass(frozen=True, slots=True)
class Request:
    """Attributes:
    sources, runs: members, and runs whose snapshots all are.
    weights: of the members; empty: each the same.
    averaged: take the moving averages of their weights.
    average_weights: evaluate the network with the mean of their weights, too.
    """

    sources: Sequence[Path]
    runs: Sequence[Path] = ()
    split: Split = "validation"
    weights: Sequence[float] = ()
    averaged: bool = False
    average_weights: bool = False
    allow_import: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Distil:
    """A student to be trained: `job` as its file has it, and how it follows the ensemble."""

    job: Job
    temperature: float = 2.0
    hard_share: float = 0.1
    resume: str | None = None


def ensemble(
    members: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CHECKPOINT|RUN_DIR]...", help="Members; of a run its newest checkpoint that verifies."
        ),
    ] = None,
    snapshots: Annotated[
        list[Path] | None, typer.Option(metavar="RUN_DIR", help="All of this run's checkpoints that verify, too.")
    ] = None,
    sweep: Annotated[Path | None, typer.Option(metavar="SWEEP_DIR", help="The best of this sweep, too.")] = None,
    best: Annotated[int | None, typer.Option(min=1, metavar="K", help="So many of the sweep; 5 if left out.")] = None,
    averaged: Annotated[
        bool, typer.Option("--averaged", help="Of each member the moving average of its weights.")
    ] = False,
    weights: Annotated[
        str, typer.Option(metavar="uniform|W,W,...", help="Of the members, in their order; made to add up to 1.")
    ] = "uniform",
    average_weights: Annotated[
        bool, typer.Option("--average-weights", help="The network with the mean of the members' weights, too.")
    ] = False,
    split: Annotated[
        Split, typer.Option(help="What is evaluated on; training is the sample of it that training evaluates.")
    ] = "validation",
    distil: Annotated[
        Path | None,
        typer.Option(metavar="JOB.toml", help="Train this job's network to predict what the ensemble does."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of JOB.toml.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of the soft targets.")] = 2.0,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the loss that the true labels have.")] = 0.1,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on with the student's run, as train does.")
    ] = None,
    allow_import: AllowImport = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate several networks and their ensemble, as one process or as one rank of several; distil it on request."""
    with ranked() as here:
        if best is not None and sweep is None:
            raise UsageError("--best K goes with --sweep SWEEP_DIR")
        sources = [*(members or ()), *(best_runs(sweep, best or 5) if sweep is not None else ())]
        if not sources and not snapshots:
            raise UsageError("no members: give checkpoints or runs, --snapshots RUN_DIR, or --sweep SWEEP_DIR")
        if distil is None and (resume is not None or overrides):
            raise UsageError("--resume and --set go with --distil JOB.toml")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise UsageError(f"--temperature {temperature:g}: a number above 0 is needed")
        request = Request(
            *(sources, snapshots or (), split),
            weights=_numbers(weights),
            averaged=averaged,
            average_weights=average_weights,
            allow_import=allow_import or (),
        )
        student = Distil(load_job(distil, overrides or ()), temperature, alpha, resume) if distil is not None else None
        if student is not None:
            check_exposure(student.job.metrics, insecure=False)
            check_import(student.job.task, request.allow_import)
        make_ensemble(request, student, here, as_json=as_json)


def make_ensemble(request: Request, student: Distil | None, here: Topology, *, as_json: bool = False) -> None:
    """Evaluate, and train the student; rank 0 prints at the end. Collective.

    Raises:
        CheckpointError, UsageError: a member cannot be had, or does not fit the others; on all ranks.
        StoppedError: a signal came.
    """
    from ddp.ensemble.findings import in_words, to_json
    from ddp.ensemble.making import evaluated, with_student
    from ddp.training.place import opened_place

    job = student.job if student is not None else without_transport(job_of([*request.sources, *request.runs][0]))
    with opened_place(job, here) as place:
        found = evaluated(place, request)
        findings, run_directory = found.findings, None
        if student is not None:
            with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # the run's own summary
                findings, run_directory = with_student(place, found, student, request)
    text = json.dumps(to_json(findings), indent=2, allow_nan=False) if as_json else in_words(findings)
    print_on_rank_0(f"{text}\n", here)
    if run_directory is not None and here.rank == 0:
        outcome.record(outcome.success(here.rank, here.world_size), run_directory)


def _numbers(text: str) -> list[float]:
    """Weights as they are written; empty for "uniform"."""
    if text == "uniform":
        return []
    try:
        numbers = [float(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text}: uniform, or numbers with commas between them") from None
    if not all(0 <= each < math.inf for each in numbers) or sum(numbers) <= 0:
        raise UsageError(f"--weights {text}: numbers from 0 on are needed, and not all of them 0")
    return numbers
