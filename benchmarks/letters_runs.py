"""What a rank of letters.py does: runs of the trainer's own steps to an accuracy, with the clocks of its steps alone.

A run is evaluated after its first steps and then each time that it is 4 % longer, so that the time to the accuracy is known
to 4 %. Both clocks stand still meanwhile: they are read before and after each step, and after an evaluation the ranks meet
before the next one begins.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp.errors import DivergedError
from ddp.job import Job, parse_job
from ddp.lr_finder.range_test import find_learning_rate
from ddp.telemetry.records import Sink, StepRecord
from ddp.telemetry.sinks import Sinks
from ddp.topology import Topology
from ddp.training.evaluation import averaged_buffers, evaluate
from ddp.training.place import Place, opened_place
from ddp.training.session import Session, prepared

LONGER = 1.04  # between two evaluations
VALIDATION_BATCH = 256
WARM_STEPS = 20
NETWORK = {"channels": 16, "units": 128, "activation": "gelu", "batch_norm": False}
LOWEST_RATE = {"sgd": 1e-3, "adam": 1e-5}  # of the range test: with fewer steps a decade nothing is learnt in it

Found = dict[str, float]
Request = Mapping[str, Any]
NOT_BEGUN: Found = {"reached": 0.0, "steps": 0, "examples": 0, "wall": math.nan, "cpu": math.nan}


@dataclass(frozen=True, slots=True)
class Images:
    """Where the images are, and the network that reads them."""

    path: str
    prefix: str | None
    target: float  # accuracy
    limit_seconds: float  # wall-clock of a run's steps
    find_steps: int  # of a pass of the range test

    def job(self, request: Request, ranks: int) -> Job:
        """The job of a request: one micro-batch a rank; measured only where that is asked for."""
        batch = request["batch"]
        task = {"name": "images", "path": self.path, **NETWORK}
        optimizer = {"name": request["optimizer"], "learning_rate": request["learning_rate"]}
        if "tuned_batch_size" in request:
            optimizer |= {"tuned_batch_size": request["tuned_batch_size"], "learning_rate_rule": "sqrt"}
        return parse_job(
            {
                "run": {"steps": 1_000_000, "seed": request["seed"], "device": "cpu", "threads_per_rank": 1},
                "task": task | ({} if self.prefix is None else {"prefix": self.prefix}),
                "batch": {"global_batch_size": batch, "micro_batch_size": -(-batch // ranks)},
                "optimizer": optimizer,
                "noise_scale": {"enabled": request.get("measured", False)},
                "metrics": {"enabled": False},
            }
        )


def answer(images: Images, requests: Sequence[Request], topology: Topology) -> list[Found]:
    """One answer for each request, the same on all ranks. Collective.

    A request's `learning_rate` may be "found": what the latest search for its optimizer and seed has found. Where that is
    nothing, the answer is a run that was never begun.
    """
    answers: list[Found] = []
    rates: dict[tuple[str, int], float] = {}
    with opened_place(images.job({**requests[0], "learning_rate": 1.0}, topology.world_size), topology) as place:
        for request in requests:
            of = (request["optimizer"], request["seed"])
            rate = rates[of] if request["learning_rate"] == "found" else request["learning_rate"]
            found = NOT_BEGUN if math.isnan(rate) else _answer(images, {**request, "learning_rate": rate}, place)
            if "found" in found:
                rates[of] = found["found"]
            answers.append({"learning_rate": rate, **found})
            if topology.rank == 0:
                print(*(request[key] for key in ("kind", "optimizer", "batch", "seed")), answers[-1], file=sys.stderr)
    return answers


def _answer(images: Images, request: Request, place: Place) -> Found:
    with prepared(place, images.job(request, place.topology.world_size)) as here:
        match request["kind"]:
            case "find":
                return _find(here, images.find_steps)
            case "pace":
                return _pace(here, request["steps"])
            case _:
                return _train(here, images)


class StepClocks:
    """Wall-clock and processor time of the steps alone, in seconds: this rank's, all of its threads."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._wall
        self.processor += time.process_time() - self._processor

    def of_all_ranks(self) -> Found:
        """The slowest rank's wall-clock, everyone's processor time. Collective."""
        wall, processor = torch.tensor([self.wall]), torch.tensor([self.processor])
        dist.all_reduce(wall, dist.ReduceOp.MAX)
        dist.all_reduce(processor)
        return {"wall": float(wall), "cpu": float(processor)}


def _find(here: Session, steps: int) -> Found:
    clocks = StepClocks()
    dist.barrier()
    with clocks:
        found = find_learning_rate(here, low=LOWEST_RATE[here.job.optimizer.name], steps=steps)
    return {"found": math.nan if found.half_way is None else found.half_way, **clocks.of_all_ranks()}


def _pace(here: Session, steps: int) -> Found:
    batches, clocks = here.steps(), StepClocks()
    for _ in range(WARM_STEPS):
        here.trainer.step(batches)
    dist.barrier()
    with clocks:
        for _ in range(steps):
            here.trainer.step(batches)
    return {"steps": steps, **clocks.of_all_ranks()}


def _train(here: Session, images: Images) -> Found:
    """Until the validation accuracy is there, or the time is over, or the run diverged."""
    trainer, batches, clocks, latest = here.trainer, here.steps(), StepClocks(), Latest()
    trainer.sinks = Sinks([latest])
    evaluated, accuracy = 0, 0.0
    dist.barrier()
    while accuracy < images.target:
        try:
            with clocks:
                rows = trainer.step(batches)
        except DivergedError:
            break
        if any(row.stop for row in rows):
            raise SystemExit("stopped by a signal")
        if trainer.step_count < max(evaluated + 1, math.floor(LONGER * evaluated)):
            continue
        evaluated, accuracy = trainer.step_count, _accuracy(here)
        if clocks.of_all_ranks()["wall"] > images.limit_seconds:
            break
        dist.barrier()
    found = {"accuracy": accuracy, "steps": trainer.step_count, "examples": trainer.examples_total}
    return {
        **found,
        "reached": float(accuracy >= images.target),
        "noise_scale": latest.noise_scale,
        **clocks.of_all_ranks(),
    }


def _accuracy(here: Session) -> float:
    trainer = here.trainer
    model = averaged_buffers(trainer.model.module, world_size=here.world_size)
    found = evaluate(
        *(trainer.task, model, trainer.splits.validation),
        rank=here.rank,
        world_size=here.world_size,
        batch_size=VALIDATION_BATCH,
        device=here.device,
    )
    return 0.0 if found is None else found.metrics["accuracy"]


class Latest(Sink):
    """A sink that keeps the noise scale as it was last known."""

    noise_scale = math.nan

    def step(self, record: StepRecord) -> None:
        if record.noise is not None and math.isfinite(record.noise.readable.noise_scale):
            self.noise_scale = record.noise.readable.noise_scale
