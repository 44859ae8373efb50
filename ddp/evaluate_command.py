"""The `evaluate` command: the metrics of a checkpoint, or of an exported model, with any number of ranks.

Every rank evaluates its share of the examples, and one collective adds up: what training's own evaluation does, with the
same running statistics. Values are added in float64, so that ranks matter only through the batches that a
rank's share is cut into, whose float32 kernels may round otherwise: losses agree to some 1e-6 of their value, and
counts, such as right answers, are the same unless one hangs on such a rounding.

Imported by every command, so torch is loaded when something is evaluated and not before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ddp.checkpoint.names import resolve
from ddp.checkpoint_command import find_checkpoint
from ddp.command_options import AllowImport, AsJson, Overrides
from ddp.errors import StoppedError, UsageError
from ddp.job import Job, check_import, load_job
from ddp.ranked_command import print_on_rank_0, ranked
from ddp.topology import Topology
from ddp.trained import job_file_of, without_transport

if TYPE_CHECKING:
    from ddp.telemetry.records import EvaluationRecord
    from ddp.training.place import Place
    from ddp.training.plan import Plan
    from ddp.training.saved_model import SavedModel

Split = Literal["validation", "training"]
SAME = 1e-5  # relative: what another number of ranks may change in a value that the run recorded


def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|RUN_DIR|FILE.safetensors", help="Of a run its newest that verifies; a file with --job."
        ),
    ],
    split: Annotated[
        Split | None,
        typer.Option(help="Of both where left out; training is the sample of it that training evaluates."),
    ] = None,
    job_file: Annotated[
        Path | None, typer.Option("--job", metavar="JOB.toml", help="The run's own job.toml where left out.")
    ] = None,
    overrides: Overrides = None,
    allow_import: AllowImport = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint or an exported model, as one process or as one rank of several."""
    with ranked() as here:
        source = resolve(source)
        job = load_job(job_file or _own_job_file(source), overrides or ())
        check_import(job.task, allow_import or ())
        splits: tuple[Split, ...] = (split,) if split else ("training", "validation")
        found = evaluate_saved(source, job, here, splits=splits, allow_import=allow_import or ())
        text = json.dumps(to_json(found), indent=2, allow_nan=False) if as_json else in_words(found)
        print_on_rank_0(f"{text}\n", here)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a saved model came to; the same on all ranks."""

    saved: SavedModel
    records: tuple[EvaluationRecord, ...]
    world_size: int  # that evaluated it

    @property
    def recorded(self) -> tuple[str, float, float] | None:
        """The validation metric in the checkpoint's manifest: its name, its value, and its value now; None without one."""
        metric = self.saved.metric
        value = next((each.value(metric.name) for each in self.records if metric and each.split == "validation"), None)
        return None if metric is None or value is None else (metric.name, metric.value, value)


def evaluate_saved(
    source: Path, job: Job, topology: Topology, *, splits: Sequence[Split], allow_import: Sequence[str] = ()
) -> Evaluated:
    """Evaluate what is at `source` on data and model of `job`. Collective.

    The records are those that the run wrote at that step, but for the time.

    Raises:
        CheckpointError: there is no model there, or another one.
        StoppedError: a rank was asked to stop; on all of them.
        UsageError: the job cannot be evaluated here.
    """
    from ddp.training.agreement import from_rank_zero, together
    from ddp.training.place import opened_place
    from ddp.training.plan import plan_run
    from ddp.training.saved_model import read_saved_model

    job = without_transport(job)
    with opened_place(job, topology) as place:
        found = together(lambda: str(_found(source)) if topology.rank == 0 else "")
        path = Path(from_rank_zero(found))
        saved = together(lambda: read_saved_model(path))
        rank = topology.rank % saved.world_size
        plan = together(lambda: plan_run(job, saved.world_size, rank, allow_import=allow_import))
        records: list[EvaluationRecord] = []
        for averaged in (False, True) if saved.averaged is not None else (False,):
            together(lambda averaged=averaged: saved.load_into(plan.module, averaged=averaged))
            plan.module.to(place.device)
            wanted: Sequence[Split] = ("validation",) if averaged else splits
            records.extend(_evaluate(place, saved, plan, each, averaged) for each in wanted if each in splits)
    return Evaluated(saved, tuple(records), topology.world_size)


def _evaluate(place: Place, saved: SavedModel, plan: Plan, split: Split, averaged: bool) -> EvaluationRecord:
    from ddp.telemetry.records import AVERAGED, EvaluationRecord
    from ddp.training.evaluation import evaluate as evaluate_on
    from ddp.training.optimizers import build_optimizer, weight_decay_penalty
    from ddp.training.precision import autocast

    job = place.job
    found = evaluate_on(
        plan.task,
        plan.module,
        plan.splits.training_sample if split == "training" else plan.splits.validation,
        rank=place.topology.rank,
        world_size=place.topology.world_size,
        batch_size=max(64, plan.batches.micro_batch_size),
        device=place.device,
        asked_to_stop=lambda: place.stop.asked,
        forward_context=lambda: autocast(job.precision, place.device),
    )
    if found is None:
        raise StoppedError("evaluate: stopped by a signal: run it again")
    name = f"{split}{AVERAGED}" if averaged else split
    step, epoch = saved.step or 0, math.nan if saved.epoch is None else saved.epoch
    optimizer = build_optimizer(job.optimizer, plan.module.named_parameters())
    penalty = 0.0 if averaged else weight_decay_penalty(optimizer)
    return EvaluationRecord(step, epoch, time.time(), name, found.examples, found.loss, found.metrics, penalty)


def in_words(found: Evaluated) -> str:
    """A line on what was evaluated, one for each split, and one on what the run had recorded."""
    saved = found.saved
    step = "" if saved.step is None else f"step {saved.step}, "
    epoch = "" if saved.epoch is None else f"epoch {saved.epoch:.2f}, "
    lines = [f"{saved.path}: {step}{epoch}written by {saved.world_size} rank(s), evaluated by {found.world_size}"]
    for each in found.records:
        values = {"loss": each.loss, **each.metrics}
        shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        decay = f", weight decay's part {each.penalty:.6g} beside it" if each.penalty else ""
        lines.append(f"{each.split}: {each.examples:,} examples, {shown}{decay}")
    if found.recorded is not None:
        name, before, now = found.recorded
        same = math.isclose(before, now, rel_tol=SAME, abs_tol=1e-12) or (before != before and now != now)
        verdict = "the same" if same else "not the same: other data, another task or another machine"
        lines.append(f"recorded in training: {name} {before:.6g}, {verdict}")
    return "\n".join(lines)


def to_json(found: Evaluated) -> dict[str, Any]:
    """Plain values; a number that is not finite as its name."""
    saved, recorded = found.saved, found.recorded
    evaluations = [
        {
            "split": each.split,
            "examples": each.examples,
            "loss": _plain(each.loss),
            "penalty": _plain(each.penalty),
            "metrics": {name: _plain(value) for name, value in each.metrics.items()},
        }
        for each in found.records
    ]
    return {
        "path": str(saved.path),
        "step": saved.step,
        "epoch": saved.epoch,
        "written_by_ranks": saved.world_size,
        "world_size": found.world_size,
        "evaluations": evaluations,
        "recorded": None if recorded is None else {"metric": recorded[0], "value": _plain(recorded[1])},
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _found(source: Path) -> Path:
    """A checkpoint's folder, or an exported file."""
    return source if source.is_file() else find_checkpoint(source)


def _own_job_file(source: Path) -> Path:
    """The job.toml of the run that `source` is, or is a checkpoint of."""
    if source.is_file():
        raise UsageError(f"{source}: an exported model does not say what it is of: give the job file, --job JOB.toml")
    return job_file_of(source, "give the job file of the run, --job JOB.toml")
