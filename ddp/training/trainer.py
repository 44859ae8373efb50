"""The training step, from top to bottom; `loop` has what goes on around it.

One step: fetch the batch; forward and backward, whose buckets the comm hook averages; exchange the step's row;
judge it (finite? stop?); enter it into the noise scale; clip and update; hand one record to the sinks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp.board import PhaseBoard
from ddp.errors import ReplicaError, UsageError
from ddp.job import Job
from ddp.tasks.base import Batch, Task
from ddp.telemetry.records import PHASES, EventKind, RunEvent, StepRecord
from ddp.telemetry.sinks import Sinks
from ddp.training.course import Course
from ddp.training.data import BatchPlan, StepData, to_device
from ddp.training.evaluation import Splits
from ddp.training.judging import BuffersBefore, Judge, Verdict
from ddp.training.loader import Loader
from ddp.training.measuring import GradientWatch
from ddp.training.optimizers import clip_
from ddp.training.phases import PhaseClock, PhaseSeconds
from ddp.training.replica_watch import ReplicaWatch
from ddp.training.saving import Saving
from ddp.training.settling import settle_buckets
from ddp.training.signals import StopRequest
from ddp.training.straggler import StragglerWatch, straggler_event
from ddp.transport.comm_hook import GradientExchange, GradientSums
from ddp.transport.row import StepRow


@dataclass
class Trainer:
    """All that changes while a run trains, on one rank; `step_count` and `examples_total` are its position."""

    job: Job
    task: Task
    splits: Splits
    course: Course
    device: torch.device
    model: DistributedDataParallel
    optimizer: Optimizer
    exchange: GradientExchange
    saving: Saving
    stop: StopRequest
    sinks: Sinks
    board: PhaseBoard
    loader: Loader | None = None
    step_count: int = 0
    examples_total: int = 0
    _previous_phases: PhaseSeconds = PhaseSeconds()

    @property
    def plan(self) -> BatchPlan:
        """How the next step's examples are dealt out."""
        return self.course.plan

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.exchange.transport.rank, self.exchange.transport.world_size
        self.watch = GradientWatch(
            *(self.job.noise_scale, self.model.module, self.optimizer, self.exchange, self.course.training_examples),
            with_replacement=self.course.sampler.replaces,
            steady=self.course.follows_readings,
        )
        self.judge = Judge(self.job.faults)
        self._buffers_before = BuffersBefore(self.model.module) if self.job.faults.on_not_finite != "stop" else None
        self.straggler = StragglerWatch(self.world_size)
        every = self.job.faults.check_replicas_every_steps
        self.replicas = ReplicaWatch(self.model.module, every, rank=self.rank, world_size=self.world_size)

    def settle(self) -> None:
        """Before a state is restored and before the first step; leaves everything as it is. Collective."""
        self.exchange.step = self.step_count
        settle_buckets(self.model, self.exchange, self._first_losses)

    def step(self, steps: Iterator[StepData]) -> list[StepRow]:
        """Take one step; what all ranks' rows said in it.

        Raises:
            DivergedError: it is not finite, and the job does not want to go on; on all ranks.
        """
        clock = PhaseClock(partial(self.board.enter, step=self.step_count + 1))
        blocked_before, wait_before = self.exchange.blocked_seconds, self.exchange.transport.wait_seconds
        self.exchange.step = self.step_count + 1
        bytes_before = self.exchange.bytes_total
        data = next(steps)
        clock.lap("data", then="forward")

        self.watch.begin(self.step_count + 1, data, self.plan)
        loss_sum = self._forward_backward(data, clock)
        sums = self.exchange.take()
        rows = self._exchange_rows(data, loss_sum, sums)
        clock.lap("exchange", then="measure")
        blocked = self.exchange.blocked_seconds - blocked_before
        waited = self.exchange.transport.wait_seconds - wait_before  # later waiting belongs to measuring

        self._compare_replicas(rows)
        verdict = self.judge.judge(rows, self.step_count + 1, self.course.epochs_done)
        if verdict is not Verdict.TAKE:
            self.saving.doubt(self.step_count)
        if verdict is Verdict.ROLL_BACK and self._roll_back():
            return rows
        self.step_count += 1
        self.examples_total += data.global_examples
        self.course.take(data)
        if verdict is not Verdict.TAKE:
            self._pass_over(data)
            return rows
        noise = self.watch.observe(rows, sums)
        clock.lap("measure", then="optimizer")
        reading = None if noise is None else noise.reading
        rate = self.course.learning_rate(data, reading)
        norm = math.sqrt(rows[0].mean_squared_norm)  # one rank's for all, whose sums may round otherwise
        self._update(rate, norm)
        clock.lap("optimizer", then="telemetry")
        straggler = self.straggler.observe([row.own_seconds for row in rows])

        record = StepRecord(
            step=self.step_count,
            epoch=self.course.epochs_done,
            unix_time=time.time(),
            examples=data.global_examples,
            examples_total=self.examples_total,
            loss=sum(row.loss_sum for row in rows) / data.global_examples,
            learning_rate=rate,
            gradient_norm=norm,
            duration_seconds=clock.elapsed_seconds,
            phase_seconds=tuple(_phases(row) for row in rows),
            all_reduce_bytes=self.exchange.bytes_total - bytes_before,
            straggler_rank=self.straggler.rank,
            slowdown_ratio=self.straggler.slowdown_ratio,
            global_batch_size=self.plan.global_batch_size,
            noise=noise,
        )
        self.sinks.step(record)
        if straggler is not None:
            self.sinks.event(straggler_event(self.straggler, straggler, self.step_count, record.unix_time))
        change = self.course.adapt(data, rows, None if noise is None else noise.readable, self.step_count)
        if change is not None:
            self.watch.restart(self.step_count)
            self.sinks.batch_change(change)
        self.replicas.take_if_due(self.step_count)
        self._previous_phases = clock.seconds(hook_seconds=blocked, wait_seconds=waited)
        return rows

    def _forward_backward(self, data: StepData, clock: PhaseClock) -> float:
        """Accumulate the gradient of the mean over this rank's examples; the last backward averages over ranks."""
        self.exchange.weight = data.examples / data.global_examples
        if self._buffers_before is not None:
            self._buffers_before.keep()
        loss_sum, count = 0.0, 0
        for index, micro_batch in enumerate(data.micro_batches):
            last = index == len(data.micro_batches) - 1
            with nullcontext() if last else self.model.no_sync():
                losses = self.course.sampler.weigh(self._losses(micro_batch), data, index)
                loss = losses.sum()
                clock.lap("forward", then="backward")
                (loss / data.examples).backward()
                clock.lap("backward", then="exchange" if last else "forward")
            self.watch.end_micro_batch(len(losses), data.examples)
            loss_sum += loss.item()
            count += len(losses)
        if count != data.examples:
            raise UsageError(f"task: loss gave {count} values for {data.examples} examples; one an example is needed")
        return loss_sum

    def _losses(self, batch: Batch) -> torch.Tensor:
        losses = self.task.loss(self.model, to_device(batch, self.device))
        if losses.dim() != 1:
            raise UsageError(
                f"task: loss has the shape {tuple(losses.shape)}; one value an example is needed, (examples,)"
            )
        return losses

    def _exchange_rows(self, data: StepData, loss_sum: float, sums: GradientSums) -> list[StepRow]:
        phases = self._previous_phases
        row = StepRow(
            examples=data.examples,
            loss_sum=loss_sum,
            finite=float(math.isfinite(loss_sum) and math.isfinite(sums.own_squared_norm)),
            stop=float(self.stop.asked),
            mean_squared_norm=sums.mean_squared_norm,
            projection=sums.projection,
            **self.watch.row_fields(sums),
            measure_seconds=phases.measure,
            part_saved=self.saving.part_saved,
            save_due=self.saving.save_due,
            **self.replicas.row_fields(),
            **{f"{phase}_seconds": getattr(phases, phase) for phase in PHASES},
        )
        return self.exchange.exchange_row(row)

    def _compare_replicas(self, rows: list[StepRow]) -> None:
        try:
            self.replicas.observe(rows)
        except ReplicaError as error:
            self.say("replicas_differ", str(error), error.rank)
            raise

    def _pass_over(self, data: StepData) -> None:
        """As if the step's examples had not been there; the schedule goes on."""
        self.course.learning_rate(data, None)
        self._forget_gradient()
        self.say("not_finite", f"{self.judge.reason}: the step was passed over", self.judge.rank)
        self.replicas.take_if_due(self.step_count)

    def _roll_back(self) -> bool:
        """Back to the newest checkpoint, on all ranks; where there is none the step is passed over."""
        self._forget_gradient()
        counts = self.judge.state_dict()
        path = self.saving.roll_back(self.step_count)
        self.judge.load_state_dict(counts)  # of this step too, which the checkpoint knows nothing of
        if path is None:
            self.judge.skip()
            return False
        self.say(
            "rolled_back",
            f"{self.judge.reason}: the run went back to step {self.step_count}, {path.name}",
            self.judge.rank,
        )
        return True

    def _forget_gradient(self) -> None:
        """Nothing of the step under way stays: its gradient, what quantising it left over, what it did to running statistics."""
        self.optimizer.zero_grad()
        self.exchange.forget_left_over()
        if self._buffers_before is not None:
            self._buffers_before.bring_back()

    def _update(self, rate: float, norm: float) -> None:
        """Clip the gradient of this norm, and step."""
        section = self.job.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if section.gradient_clip_norm is not None:
            clip_(self.optimizer, self.model.parameters(), norm, section.gradient_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def say(self, kind: EventKind, text: str, rank: int = -1) -> None:
        """Tell the sinks what happened to the run at this step."""
        self.sinks.event(RunEvent(self.step_count, time.time(), kind, rank, text))

    def _first_losses(self) -> torch.Tensor:
        return self._losses(self.course.first_micro_batch(self.splits.training, self.rank))


def _phases(row: StepRow) -> dict[str, float]:
    return {phase: getattr(row, f"{phase}_seconds") for phase in PHASES}
