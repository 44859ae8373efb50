"""Whole training runs on real ranks, and what they left on the disk; and tasks that misbehave on demand.

ended = train_ranks(rank_pool, 2, job(tmp_path, global_batch_size=10))
assert ended[1].kind == "" and len(steps_of(tmp_path / "run")) == 20
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp import checkpoint
from ddp.errors import DdpError, UsageError
from ddp.job import Job, parse_job
from ddp.tasks.base import Goal, TensorExamples
from ddp.telemetry.recording import open_recording, read_steps
from ddp.telemetry.records import StepRecord
from ddp.topology import Topology
from ddp.training import run
from ranks import RankPool

EXAMPLES, INPUTS = 61, 5


@dataclass(frozen=True)
class Ended:
    """How `train` ended on one rank: the error's type ("" for none), its message and notes, and what was left."""

    kind: str
    message: str
    step: int | None
    run_directory: Path | None
    printed: str
    threads: int  # more than before
    parameters: list[Tensor]  # of the last model that `Misbehaving` made


def job(folder: Path, **settings: Any) -> Job:
    """Linear regression for 20 steps in `folder`/run; `settings` are `section__key=value` or batch sizes."""
    table: dict[str, dict[str, Any]] = {
        "run": {"id": "run", "directory": str(folder), "device": "cpu", "threads_per_rank": 1},
        "task": {"name": "training_runs:Misbehaving"},
        "batch": {"global_batch_size": 12, "micro_batch_size": 12},
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "transport": {"timeout_seconds": 30.0},
        "metrics": {"enabled": False},
        "evaluation": {"metric": "loss"},
        "noise_scale": {"sample_every": 3},  # "auto" goes by the clock: then two runs are not sampled in the same steps
    }
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        table.setdefault(section or "batch", {})[key] = value
    if "epochs" not in table["run"]:
        table["run"].setdefault("steps", 20)
    return parse_job(table)


def train_ranks(
    pool: RankPool, world_size: int, jobs: Job | Sequence[Job], *, resume: str | None = None, timeout: float = 60.0
) -> list[Ended]:
    """`train` on each rank; of several `jobs` each rank takes its own."""
    each = [jobs] * world_size if isinstance(jobs, Job) else list(jobs)
    return pool.run(world_size, train_one, each, resume, timeout=timeout)


def train_one(rank: int, world_size: int, store_address: str, jobs: Sequence[Job], resume: str | None) -> Ended:
    printed, threads = io.StringIO(), threading.active_count()
    Misbehaving.last_model = None
    error: Exception | None = None
    with agent_environment(store_address), contextlib.redirect_stdout(printed):
        try:
            place = Topology(rank, world_size, rank, world_size, launcher="torchrun")
            run.train(jobs[rank], place, resume=resume, allow_import=[jobs[rank].task.name.partition(":")[0]])
        except DdpError as caught:
            error = caught
    return Ended(
        kind=type(error).__name__ if error else "",
        message=str(error or ""),
        step=getattr(error, "step", None),
        run_directory=getattr(error, "run_directory", None),
        printed=printed.getvalue(),
        threads=threading.active_count() - threads,
        parameters=_last_parameters(),
    )


def _last_parameters() -> list[Tensor]:
    model = Misbehaving.last_model
    return [] if model is None else [parameter.detach().clone() for parameter in model.parameters()]


@contextlib.contextmanager
def agent_environment(store_address: str) -> Iterator[None]:
    """What torchrun's agent sets for its workers, for code that starts its process group itself (`env://`).

    On the way out, also after an error, the environment is as it was and no process group is left.
    """
    before = dict(os.environ)
    host, _, port = store_address.rpartition(":")
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def steps_of(run_directory: Path) -> list[StepRecord]:
    """What the run recorded of each step."""
    with contextlib.closing(open_recording(run_directory / "run.db")) as database:
        return list(read_steps(database))


def losses_of(run_directory: Path) -> list[float]:
    return [record.loss for record in steps_of(run_directory)]


def saved(run_directory: Path, step: int, world_size: int) -> dict[str, Any]:
    """All that the checkpoint of `step` holds but times, each rank's own part included."""
    path = checkpoint.find(run_directory / "checkpoints", step)
    own = {rank: checkpoint.load(path, rank)[1] for rank in range(world_size)}
    shared = checkpoint.load_shared(path)
    del shared["goodput"]  # goes by the clock
    return {"shared": shared, "own": own}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nests of plain values and tensors differ in any bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{where}[{i}]")
        ]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    else:
        same = repr(one) == repr(other)
    return [] if same else [f"{where}: {one} and {other}"]


class Misbehaving:
    """Linear regression; when the training example number `example` is fetched or used, `action` happens.

    Args:
        action: none; nan_loss, nan_gradient (of that example); signal (to the rank that fetches it in training); random
            (every example is augmented from Python's, numpy's and torch's generators);
            slow (the rank `rank` sleeps in its data set); overhead (a forward takes 5 ms, however few examples it has);
            refuse (the rank `rank` has a usage error); extra_metric (from the third evaluation on there is one that
            `goals` does not name).
    """

    goals: Mapping[str, Goal] = {"error": "min"}
    last_model: nn.Module | None = None  # for the test to look at

    def __init__(
        self, action: str = "none", example: int = -1, rank: int = -1, examples: int = EXAMPLES, where: str = "task"
    ) -> None:
        self.action, self.example, self.examples, self.where = action, example, examples, where
        self.is_the_one = dist.get_rank() == rank
        self.metrics_taken = 0
        self._refuse("task")

    def model(self) -> nn.Module:
        self._refuse("model")
        Misbehaving.last_model = nn.Sequential(nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 1))
        return Misbehaving.last_model

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(self.examples, INPUTS, generator=generator)
        targets = inputs.sum(dim=1) + torch.randn(self.examples, generator=generator)
        numbers = torch.arange(self.examples)
        return _Watched(self, numbers, inputs, targets), TensorExamples(numbers - self.examples, inputs, targets)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        numbers, inputs, targets = batch
        if self.action == "overhead":
            time.sleep(0.005)
        outputs = model(inputs)[:, 0]
        losses = (outputs - targets).square()
        chosen = numbers == self.example
        if self.action == "nan_loss":
            losses = losses * torch.where(chosen, torch.nan, 1.0)
        if self.action == "nan_gradient" and chosen.any():
            losses = losses + (0 * outputs[chosen]).sqrt().sum()  # adds 0; its derivative is infinity times 0
        return losses

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Tensor]:
        self.metrics_taken += 1
        errors = (model(batch[1])[:, 0] - batch[2]).abs()
        extra = self.action == "extra_metric" and self.metrics_taken > 4  # two splits, a batch each
        return {"error": errors, "extra": errors} if extra else {"error": errors}

    def act(self, indices: Sequence[int]) -> None:
        if self.action == "slow" and self.is_the_one:
            time.sleep(0.05)
        if self.action == "signal" and torch.is_grad_enabled() and self.example in indices and self.example >= 0:
            self.example = -1
            os.kill(os.getpid(), signal.SIGTERM)

    def _refuse(self, where: str) -> None:
        if self.action == "refuse" and self.where == where and self.is_the_one:
            raise UsageError("this rank refuses")


class _Watched(TensorExamples):
    """The training set: tells the task what is fetched."""

    def __init__(self, task: Misbehaving, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.task = task

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        self.task.act(indices)
        numbers, inputs, targets = super().__getitems__(indices)
        if self.task.action == "random":
            inputs = inputs + random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(1)
        return numbers, inputs, targets
