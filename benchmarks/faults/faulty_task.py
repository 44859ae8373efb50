"""The task of the runs that are injured: a small regression that does harm to its own rank on demand.

It is copied into the folder of a case and trained there. The first harm leaves the file `harmed` with the time of it, so
that an attempt that comes after a restart is left in peace. Beside it each rank leaves `rank-R.pid` and, at every
evaluation, `weights-R` (SHA-256 over the parameters), and with `log_examples` a line for each optimizer step with
the numbers of the examples in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddp.tasks.base import Goal, TensorExamples

INPUTS = 5
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename")
HARMED = Path("harmed")


class Task:
    """Regression by a small network with running statistics and dropout.

    Args:
        action: none; kill (SIGKILL), stop (SIGSTOP), announce (only writes `harmed`); sleep (every time);
            nan_loss, inf_loss, nan_gradient, inf_gradient; flip (a bit of a parameter); fill (the disk of the run).
        phase: where: warm_up, data, forward, all_reduce, optimizer, save, evaluation.
        rank, step: the rank that is harmed, in the first such phase from that step on.
        times: how often; a sleep has no end.
        after_seconds: from the beginning of the phase to the harm, on a thread, while the rank goes on.
        hold_seconds: how long the rank stays where it has announced itself, or sleeps.
        step_seconds: what every forward takes in addition.
        spare_bytes: what `fill` leaves free.
        parameter, element, bit: what is flipped; the first two count modulo how many there are.
        examples: of the training set.
        log_examples: whether each rank writes `examples-R`.
    """

    goals: Mapping[str, Goal] = {"error": "min"}

    def __init__(
        self,
        action: str = "none",
        phase: str = "forward",
        rank: int = -1,
        step: int = 0,
        times: int = 1,
        after_seconds: float = 0.0,
        hold_seconds: float = 0.0,
        step_seconds: float = 0.0,
        spare_bytes: int = 0,
        parameter: int = 0,
        element: int = 0,
        bit: int = 0,
        examples: int = 89,
        log_examples: bool = False,
    ) -> None:
        self.rank = dist.get_rank()
        self.action, self.phase, self.at_step, self.times = action, phase, step, times
        self.is_harmed = self.rank == rank and action != "none" and not HARMED.exists()
        self.after_seconds, self.hold_seconds, self.step_seconds = after_seconds, hold_seconds, step_seconds
        self.spare_bytes, self.bit_place = spare_bytes, (parameter, element, bit)
        self.examples, self.log_examples = examples, log_examples
        self.steps, self.is_warm, self.seen = 0, False, list[int]()  # optimizer steps taken, as far as is known
        self.attempt = time.time_ns()
        Path(f"rank-{self.rank}.pid").write_text(str(os.getpid()))
        if self.is_harmed and phase == "save":
            sys.addaudithook(self._watch_saving)
        register_optimizer_step_pre_hook(self._before_update)
        register_optimizer_step_post_hook(self._after_update)

    def model(self) -> nn.Module:
        self.module = nn.Sequential(
            nn.Linear(INPUTS, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 1)
        )
        if self.is_harmed and self.phase == "all_reduce":  # the gradient that comes last: peers may reduce already
            next(self.module.parameters()).register_post_accumulate_grad_hook(self._last_gradient)
        return self.module

    def datasets(self) -> tuple[_Watched, TensorExamples]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(self.examples, INPUTS, generator=generator)
        targets = inputs.sum(dim=1) + torch.randn(self.examples, generator=generator)
        numbers = torch.arange(self.examples)
        return _Watched(self, numbers, inputs, targets), TensorExamples(numbers, inputs, targets)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        numbers, inputs, targets = batch
        outputs = model(inputs)[:, 0]
        losses = (outputs - targets).square()
        if not torch.is_grad_enabled():
            return losses
        time.sleep(self.step_seconds)
        if not self.is_warm:
            self.is_warm = True
            self._reach("warm_up")
            return losses
        self.seen += numbers.tolist()
        return self._spoilt(losses, outputs) if self._reach("forward") else losses

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Tensor]:
        self._reach("evaluation")
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        Path(f"weights-{self.rank}").write_text(digest.hexdigest())
        return {"error": (model(batch[1])[:, 0] - batch[2]).abs()}

    def fetched(self) -> None:
        self._reach("data")

    def _last_gradient(self, _parameter: Tensor) -> None:
        self._reach("all_reduce")

    def _before_update(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        states = list(optimizer.state.values())
        self.steps = int(states[0]["step"]) if states and "step" in states[0] else self.steps  # also after a resume
        self._reach("optimizer")

    def _after_update(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self.steps += 1
        if self.log_examples:
            with Path(f"examples-{self.rank}").open("a", encoding="ascii") as file:
                file.write(json.dumps([self.attempt, self.steps, time.time(), self.seen]) + "\n")
        self.seen = []

    def _watch_saving(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Of every file operation of this process: one in a checkpoint that has no name yet is saving."""
        if event in FILE_OPERATIONS and "/.step-" in str(arguments[0]):
            self._reach("save")

    def _reach(self, phase: str) -> bool:
        """Do what was asked for, if this is the place; whether it is."""
        begun = self.steps + (phase not in ("evaluation", "save"))
        if not self.is_harmed or phase != self.phase or (begun < self.at_step and phase != "warm_up"):
            return False
        if self.action == "sleep":
            time.sleep(self.hold_seconds)
            return True
        self.times -= 1
        self.is_harmed = self.times > 0
        if self.after_seconds:
            threading.Timer(self.after_seconds, self._act).start()
        else:
            self._act()
        return True

    def _act(self) -> None:
        note = {"time": time.time(), "step": self.steps + 1, "rank": self.rank, "pid": os.getpid()}
        if self.action == "flip":
            note["parameter"] = self._flip()
        temporary = HARMED.with_name("harmed.new")
        temporary.write_text(json.dumps(note))
        temporary.rename(HARMED)
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "announce":
                time.sleep(self.hold_seconds)
            case "fill":
                _fill(next(Path("runs").glob("*/checkpoints")) / "filler", self.spare_bytes)

    def _spoilt(self, losses: Tensor, outputs: Tensor) -> Tensor:
        zero = outputs - outputs.detach()
        match self.action:
            case "nan_loss":
                return losses * torch.nan
            case "inf_loss":
                return losses + torch.inf
            case "nan_gradient":
                return losses + (0 * zero).sqrt()  # adds 0; its derivative is 0 times infinity
            case "inf_gradient":
                return losses + zero.sqrt()
        return losses

    def _flip(self) -> str:
        number, element, bit = self.bit_place
        named = list(self.module.named_parameters())
        name, parameter = named[number % len(named)]
        bits = parameter.detach().view(-1).view(torch.int32)
        bits[element % len(bits)] ^= (1 << bit) if bit < 31 else -(1 << 31)
        return name


class _Watched(TensorExamples):
    """The training set: tells the task that something is fetched."""

    def __init__(self, task: Task, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.task, self.process_id = task, os.getpid()

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        if os.getpid() == self.process_id and torch.is_grad_enabled():  # not for an evaluation, not in a worker
            self.task.fetched()
        return super().__getitems__(indices)


def _fill(path: Path, spare_bytes: int) -> None:
    """Write until the disk is full, then give so much back."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 9):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        os.ftruncate(file.fileno(), max(0, file.tell() - spare_bytes))
