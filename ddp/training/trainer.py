"""The training step, from top to bottom; `loop` has what goes on around it.

One step: fetch the batch; forward and backward (`passes`), whose buckets the comm hook averages; exchange the step's row;
judge it (finite? stop?); enter it into the noise scale; clip and update (`update`); hand one record to the sinks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp.board import PhaseBoard
from ddp.errors import ReplicaError
from ddp.job import Job
from ddp.tasks.base import Task
from ddp.telemetry.records import PHASES, EventKind, RunEvent, StepRecord
from ddp.telemetry.sinks import Sinks
from ddp.training.averaged_weights import AveragedWeights
from ddp.training.course import Course
from ddp.training.data import BatchPlan, StepData
from ddp.training.early_stopping import EarlyStopping
from ddp.training.evaluation import Splits
from ddp.training.judging import BuffersBefore, Judge, Verdict
from ddp.training.loader import Loader
from ddp.training.measuring import GradientWatch
from ddp.training.observing import StepObserver
from ddp.training.passes import Passes, PassTotals
from ddp.training.phases import PhaseClock, PhaseSeconds
from ddp.training.replica_watch import ReplicaWatch
from ddp.training.saving import Saving
from ddp.training.settling import settle_buckets
from ddp.training.signals import StopRequest
from ddp.training.straggler import StragglerWatch, straggler_event
from ddp.training.update import Update, momentum_of
from ddp.transport.comm_hook import GradientExchange
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
    averaged: AveragedWeights | None = None
    early_stopping: EarlyStopping | None = None
    observers: list[StepObserver] = field(default_factory=list)
    step_count: int = 0
    examples_total: int = 0
    _previous_phases: PhaseSeconds = PhaseSeconds()
    _previous_cpu_seconds: float = 0.0

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
        self.passes = Passes(self.job, self.task, self.model, self.device, self.exchange, self.course.sampler)
        self.update = Update(self.job.optimizer, self.model, self.optimizer, self.averaged)
        self.judge = Judge(self.job.faults)
        may_pass_over = self.job.faults.on_not_finite != "stop" or self.passes.scale.enabled
        self._buffers_before = BuffersBefore(self.model.module) if may_pass_over else None
        self.straggler = StragglerWatch(self.world_size)
        every = self.job.faults.check_replicas_every_steps
        self.replicas = ReplicaWatch(self.model.module, every, rank=self.rank, world_size=self.world_size)

    @property
    def is_over(self) -> bool:
        """Whether the last step was the run's last."""
        stopped = self.early_stopping is not None and self.early_stopping.stopped
        return stopped or self.course.is_over(self.step_count)

    def settle(self) -> None:
        """Before a state is restored and before the first step; leaves everything as it is. Collective."""
        self.exchange.step = self.step_count
        settle_buckets(self.model, self.exchange, self._first_losses)

    def step(self, steps: Iterator[StepData]) -> list[StepRow]:
        """Take one step; what all ranks' rows said in it.

        Raises:
            DivergedError: it is not finite, and the job does not want to go on; on all ranks.
        """
        clock, cpu_before = PhaseClock(partial(self.board.enter, step=self.step_count + 1)), time.process_time()
        blocked_before, wait_before = self.exchange.blocked_seconds, self.exchange.transport.wait_seconds
        self.exchange.step = self.step_count + 1
        bytes_before = self.exchange.bytes_total
        data = next(steps)
        clock.lap("data", then="forward")

        observers = [each for each in self.observers if each.wants(self.step_count + 1)]
        for each in observers:
            each.before_forward(self.step_count + 1)
        if self._buffers_before is not None:
            self._buffers_before.keep()
        totals = self.passes.take(self.step_count + 1, data, self.plan, clock, self.watch)
        rows = self._exchange_rows(data, totals)
        clock.lap("exchange", then="measure")
        blocked = self.exchange.blocked_seconds - blocked_before
        waited = self.exchange.transport.wait_seconds - wait_before  # later waiting belongs to measuring

        self._compare_replicas(rows)
        overflowed = self.passes.scale.overflowed(rows)
        verdict = Verdict.SKIP if overflowed else self.judge.judge(rows, self.step_count + 1, self.course.epochs_done)
        if verdict is not Verdict.TAKE and not overflowed:
            self.saving.doubt(self.step_count)
        if verdict is Verdict.ROLL_BACK and self._roll_back():
            return rows
        self.step_count += 1
        self.examples_total += data.global_examples
        self.course.take(data)
        if verdict is not Verdict.TAKE:
            self._pass_over(data, "" if overflowed else self.judge.reason)
            return rows
        noise = self.watch.observe(rows, totals.sums)
        clock.lap("measure", then="optimizer")
        reading = None if noise is None else noise.reading
        rate = self.course.learning_rate(data, reading)
        norm = math.sqrt(rows[0].mean_squared_norm)  # one rank's for all, whose sums may round otherwise
        for each in observers:
            each.before_update(self.step_count)
        self.update.take(self.step_count, rate, norm, self.course.momentum)
        for each in observers:
            each.after_update(self.step_count, self.sinks)
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
            metric=sum(row.metric_sum for row in rows) / data.global_examples,
            momentum=momentum_of(self.optimizer),
            cpu_seconds=sum(row.cpu_seconds for row in rows),
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
        self._previous_cpu_seconds = time.process_time() - cpu_before
        return rows

    def _exchange_rows(self, data: StepData, totals: PassTotals) -> list[StepRow]:
        phases, sums = self._previous_phases, totals.sums
        row = StepRow(
            examples=data.examples,
            loss_sum=totals.loss_sum,
            finite=float(totals.finite),
            stop=float(self.stop.asked),
            mean_squared_norm=sums.mean_squared_norm,
            projection=sums.projection,
            **self.watch.row_fields(sums),
            measure_seconds=phases.measure,
            part_saved=self.saving.part_saved,
            save_due=self.saving.save_due,
            metric_sum=totals.metric_sum,
            cpu_seconds=self._previous_cpu_seconds,
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

    def _pass_over(self, data: StepData, reason: str) -> None:
        """As if the step's examples had not been there; the schedule goes on. Too large a loss scale is no news."""
        self.course.learning_rate(data, None)
        self._forget_gradient()
        if reason:
            self.say("not_finite", f"{reason}: the step was passed over", self.judge.rank)
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

    def say(self, kind: EventKind, text: str, rank: int = -1) -> None:
        """Tell the sinks what happened to the run at this step."""
        self.sinks.event(RunEvent(self.step_count, time.time(), kind, rank, text))

    def _first_losses(self) -> torch.Tensor:
        return self.passes.losses(self.course.first_micro_batch(self.splits.training, self.rank))


def _phases(row: StepRow) -> dict[str, float]:
    return {phase: getattr(row, f"{phase}_seconds") for phase in PHASES}
