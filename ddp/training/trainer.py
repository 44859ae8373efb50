"""The training step, from top to bottom, and the loop around it.

One step: fetch the batch; forward and backward, whose buckets the comm hook averages; exchange the step's row;
judge it (finite? stop?); enter it into the noise scale; clip and update; hand one record to the sinks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp.errors import StoppedError, UsageError
from ddp.job import Job
from ddp.tasks.base import Batch, Task
from ddp.telemetry.records import PHASES, EventKind, RunEvent, StepRecord
from ddp.telemetry.sinks import Sinks
from ddp.training.course import Course, say_rate
from ddp.training.data import BatchPlan, StepData, batches, to_device
from ddp.training.evaluation import Splits, evaluate_splits
from ddp.training.judging import BuffersBefore, Judge, Verdict
from ddp.training.measuring import GradientWatch
from ddp.training.optimizers import clip_
from ddp.training.phases import PhaseClock, PhaseSeconds
from ddp.training.saving import Saving
from ddp.training.settling import settle_buckets
from ddp.training.signals import StopRequest
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
    step_count: int = 0
    examples_total: int = 0
    _previous_phases: PhaseSeconds = PhaseSeconds()
    _evaluated_at: int = -1
    _metric: float | None = None  # of the validation set, as of _evaluated_at

    @property
    def plan(self) -> BatchPlan:
        """How the next step's examples are dealt out."""
        return self.course.plan

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.exchange.transport.rank, self.exchange.transport.world_size
        self.watch = GradientWatch(
            *(self.job.noise_scale, self.model.module, self.optimizer, self.exchange, self.plan.examples),
            steady=self.course.follows_readings,
        )
        self._judge = Judge(self.job.faults)
        self._buffers_before = BuffersBefore(self.model.module) if self.job.faults.on_not_finite != "stop" else None

    def settle(self) -> None:
        """Before a state is restored and before the first step; leaves everything as it is. Collective."""
        self.exchange.step = self.step_count
        settle_buckets(self.model, self.exchange, self._first_losses)

    def run(self) -> None:
        """Train from where `step_count` stands to the last step; evaluates and saves on the way and at the end."""
        self._stop_if(_any_rank(self.stop.asked))
        if self.step_count and self._evaluation_is_due():
            self._evaluate()  # a stop in that step came before
        if self.rank == 0:
            say_rate(self.course)
        steps = self.course.batches(
            self.splits.training, self.rank, lambda: self.watch.least_parts(self.step_count + 1)
        )
        while not self.course.is_over(self.step_count):
            rows = self._step(steps)
            self._look_after_saving(rows)
            self._stop_if([bool(row.stop) for row in rows])
            if self._evaluated_at != self.step_count and self._evaluation_is_due():
                self._evaluate()
            self._save_if_due()
        if self._evaluated_at != self.step_count:
            self._evaluate()
        self.saving.finish(self.step_count, self._metric_now())

    def _step(self, steps: Iterator[StepData]) -> list[StepRow]:
        clock = PhaseClock()
        blocked_before, wait_before = self.exchange.blocked_seconds, self.exchange.transport.wait_seconds
        self.exchange.step = self.step_count + 1
        bytes_before = self.exchange.bytes_total
        data = next(steps)
        clock.lap("data")

        self.watch.begin(self.step_count + 1, data, self.plan)
        loss_sum = self._forward_backward(data, clock)
        sums = self.exchange.take()
        rows = self._exchange_rows(data, loss_sum, sums)
        clock.lap("exchange")
        blocked = self.exchange.blocked_seconds - blocked_before
        waited = self.exchange.transport.wait_seconds - wait_before  # later waiting belongs to measuring

        verdict = self._judge.judge(rows, self.step_count + 1, self.course.epochs_done)
        if verdict is Verdict.ROLL_BACK:
            self._roll_back()
            return rows
        self.step_count += 1
        self.examples_total += data.global_examples
        self.course.take(data)
        if verdict is Verdict.SKIP:
            self._pass_over(data)
            return rows
        noise = self.watch.observe(rows, sums)
        clock.lap("measure")
        reading = None if noise is None else noise.reading
        rate = self.course.learning_rate(data, reading)
        norm = math.sqrt(rows[0].mean_squared_norm)  # one rank's for all, whose sums may round otherwise
        self._update(rate, norm)
        clock.lap("optimizer")

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
            straggler_rank=_straggler(rows),
            global_batch_size=self.plan.global_batch_size,
            noise=noise,
        )
        self.sinks.step(record)
        change = self.course.adapt(data, rows, None if noise is None else noise.readable, self.step_count)
        if change is not None:
            self.watch.restart(self.step_count)
            self.sinks.batch_change(change)
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
                losses = self._losses(micro_batch)
                loss = losses.sum()
                clock.lap("forward")
                (loss / data.examples).backward()
                clock.lap("backward")
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
            **{f"{phase}_seconds": getattr(phases, phase) for phase in PHASES},
        )
        return self.exchange.exchange_row(row)

    def _pass_over(self, data: StepData) -> None:
        """As if the step's examples had not been there; the schedule goes on."""
        self.course.learning_rate(data, None)
        self._forget_gradient()
        self._say("not_finite", f"{self._judge.reason}: the step was passed over", self._judge.rank)

    def _roll_back(self) -> None:
        """Back to the newest checkpoint, on all ranks."""
        self._forget_gradient()
        path = self.saving.roll_back(self._judge.diverged(", and there is no checkpoint to go back to"))
        self._evaluated_at = -1
        self._say(
            "rolled_back",
            f"{self._judge.reason}: the run went back to step {self.step_count}, {path.name}",
            self._judge.rank,
        )

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

    def _evaluation_is_due(self) -> bool:
        section = self.job.evaluation
        if section.every_steps is not None:
            return self.step_count % section.every_steps == 0
        return self.course.has_finished_epochs(section.every_epochs or 1)

    def _evaluate(self) -> None:
        """Both splits; a signal meanwhile stops the run, whose next part begins with them."""
        records = evaluate_splits(
            *(self.task, self.model.module, self.splits),
            step=self.step_count,
            epoch=self.course.epochs_done,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=max(64, self.plan.micro_batch_size),
            device=self.device,
            asked_to_stop=lambda: self.stop.asked,
        )
        if records is None:
            self._stop_if(_any_rank(self.stop.asked))
        for record in records or ():
            self.sinks.evaluation(record)
            self._evaluated_at, self._metric = self.step_count, record.value(self.job.evaluation.metric)

    def _metric_now(self) -> float | None:
        """Of the validation set at the weights as they are now, where it was taken."""
        return self._metric if self._evaluated_at == self.step_count else None

    def _save_if_due(self) -> None:
        if self.course.is_over(self.step_count) or self.saving.last_step == self.step_count:
            return  # the end saves; or the run has just come from there
        value = self._metric_now()
        is_best = value is not None and self.saving.best.enters(value)
        if is_best or self.saving.is_due(self.step_count):
            self.saving.begin(self.step_count, value)

    def _look_after_saving(self, rows: Sequence[StepRow]) -> None:
        if (fault := self.saving.observe(rows)) is not None:
            self._say("save_failed", fault)

    def _stop_if(self, asked: Sequence[bool]) -> None:
        """Save and stop where any rank was asked to. Before an evaluation, which may take long."""
        if not any(asked):
            return
        path = self.saving.finish(self.step_count, self._metric_now())
        by = self.stop.signal_name or f"a signal to rank {list(asked).index(True)}"
        raise StoppedError(f"stopped by {by} after step {self.step_count}; go on with --resume {path}")

    def _say(self, kind: EventKind, text: str, rank: int = -1) -> None:
        self.sinks.event(RunEvent(self.step_count, time.time(), kind, rank, text))

    def _first_losses(self) -> torch.Tensor:
        data = next(iter(batches(self.splits.training, self.plan, self.rank, 0, 0)))
        return self._losses(data.micro_batches[0])


def _any_rank(asked: bool) -> list[bool]:
    """What each rank says. Collective."""
    says = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(says, torch.tensor([float(asked)]))
    return [bool(each) for each in says]


def _phases(row: StepRow) -> dict[str, float]:
    return {phase: getattr(row, f"{phase}_seconds") for phase in PHASES}


def _straggler(rows: list[StepRow]) -> int:
    """The rank with the longest way to its last gradient in the previous step, waiting not counted."""
    own = [row.data_seconds + row.forward_seconds + row.backward_seconds for row in rows]
    return int(np.argmax(own)) if len(rows) > 1 and any(own) else -1
