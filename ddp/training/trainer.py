"""The training step, from top to bottom, and the loop around it.

One step: fetch the batch; forward and backward, whose buckets the comm hook averages; exchange the step's row;
judge it (finite? stop?); enter it into the noise scale; clip and update; hand one record to the sinks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ddp.board import PhaseBoard
from ddp.errors import DivergedError, StoppedError, UsageError
from ddp.job import Job
from ddp.tasks.base import Batch, Task
from ddp.telemetry.records import PHASES, EvaluationRecord, Sink, StepRecord
from ddp.training.course import Course, say_rate
from ddp.training.data import BatchPlan, StepData, batches, to_device
from ddp.training.evaluation import averaged_buffers, evaluate
from ddp.training.measuring import GradientWatch
from ddp.training.optimizers import clip_
from ddp.training.phases import PhaseClock, PhaseSeconds
from ddp.training.random_state import preserved_random_state
from ddp.training.signals import StopRequest
from ddp.transport.comm_hook import GradientExchange, GradientSums
from ddp.transport.row import StepRow


@dataclass(frozen=True, slots=True)
class Splits:
    """The data sets of a run. `training_sample` is as large as the validation set and fixed, for evaluation."""

    training: Dataset[Any]
    validation: Dataset[Any]
    training_sample: Dataset[Any]


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
    stop: StopRequest
    sinks: Sequence[Sink]
    save_checkpoint: Callable[[Trainer], Path]
    board: PhaseBoard
    step_count: int = 0
    examples_total: int = 0
    _previous_phases: PhaseSeconds = PhaseSeconds()
    _evaluated_at: int = -1

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

    def run(self) -> None:
        """Train from where `step_count` stands to the last step; evaluates and saves on the way and at the end."""
        self._settle_buckets()
        if self.step_count and self._evaluation_is_due():
            self._evaluate()  # a stop in that step came before
        if self.rank == 0:
            say_rate(self.course)
        steps = self.course.batches(
            self.splits.training, self.rank, lambda: self.watch.least_parts(self.step_count + 1)
        )
        while not self.course.is_over(self.step_count):
            self._stop_if_asked(self._step(steps))
            if self._evaluation_is_due():
                self._evaluate()
            if self._checkpoint_is_due():
                self.save_checkpoint(self)
        if self._evaluated_at != self.step_count:
            self._evaluate()
        self.save_checkpoint(self)

    def _step(self, steps: Iterator[StepData]) -> list[StepRow]:
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

        self.step_count += 1
        self.examples_total += data.global_examples
        self.course.take(data)
        self._raise_if_not_finite(rows)
        noise = self.watch.observe(rows, sums)
        clock.lap("measure", then="optimizer")
        reading = None if noise is None else noise.reading
        rate = self.course.learning_rate(data, reading)
        norm = math.sqrt(rows[0].mean_squared_norm)  # one rank's for all, whose sums may round otherwise
        self._update(rate, norm)
        clock.lap("optimizer", then="telemetry")

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
        for sink in self.sinks:
            sink.step(record)
        change = self.course.adapt(data, rows, None if noise is None else noise.readable, self.step_count)
        if change is not None:
            self.watch.restart(self.step_count)
            for sink in self.sinks:
                sink.batch_change(change)
        self._previous_phases = clock.seconds(hook_seconds=blocked, wait_seconds=waited)
        return rows

    def _forward_backward(self, data: StepData, clock: PhaseClock) -> float:
        """Accumulate the gradient of the mean over this rank's examples; the last backward averages over ranks."""
        self.exchange.weight = data.examples / data.global_examples
        loss_sum, count = 0.0, 0
        for index, micro_batch in enumerate(data.micro_batches):
            last = index == len(data.micro_batches) - 1
            with nullcontext() if last else self.model.no_sync():
                losses = self._losses(micro_batch)
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
            **{f"{phase}_seconds": getattr(phases, phase) for phase in PHASES},
        )
        return self.exchange.exchange_row(row)

    def _raise_if_not_finite(self, rows: list[StepRow]) -> None:
        bad = [str(rank) for rank, row in enumerate(rows) if not row.finite]
        if bad:
            raise DivergedError(
                f"the loss or the gradient is not finite on rank {', '.join(bad)} in step {self.step_count} "
                f"(epoch {self.course.epochs_done:.2f}): lower optimizer.learning_rate, add schedule.warmup_steps or "
                "optimizer.gradient_clip_norm, or look for bad values in the data"
            )

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
        """Both splits, with running statistics averaged over ranks in a copy; training keeps its own."""
        self._evaluated_at = self.step_count
        self.board.enter("evaluation", self.step_count)
        with preserved_random_state():
            self._evaluate_splits()

    def _evaluate_splits(self) -> None:
        model = averaged_buffers(self.model.module, world_size=self.world_size)
        for split, dataset in (("training", self.splits.training_sample), ("validation", self.splits.validation)):
            loss, metrics, examples = evaluate(
                self.task,
                model,
                dataset,
                rank=self.rank,
                world_size=self.world_size,
                batch_size=max(64, self.plan.micro_batch_size),
                device=self.device,
            )
            record = EvaluationRecord(
                self.step_count, self.course.epochs_done, time.time(), split, examples, loss, metrics
            )
            for sink in self.sinks:
                sink.evaluation(record)

    def _stop_if_asked(self, rows: list[StepRow]) -> None:
        """Before an evaluation, which may take longer than a launcher waits after a signal."""
        asked = [rank for rank, row in enumerate(rows) if row.stop]
        if asked:
            path = self.save_checkpoint(self)
            by = self.stop.signal_name or f"a signal to rank {asked[0]}"
            raise StoppedError(f"stopped by {by} after step {self.step_count}; go on with --resume {path}")

    def _checkpoint_is_due(self) -> bool:
        every = self.job.checkpoint.every_steps
        return every is not None and self.step_count % every == 0 and not self.course.is_over(self.step_count)

    def _settle_buckets(self) -> None:
        """One backward whose gradient is thrown away, so that DDP rebuilds its buckets before the first step.

        DDP reduces its first backward as one bucket. Sums of squares depend on the buckets in their last
        bits, so a resumed run would differ from one that went on: this way all steps have the same buckets.
        """
        self.exchange.step = self.step_count
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with preserved_random_state():
            data = next(iter(batches(self.splits.training, self.plan, self.rank, 0, 0)))
            self._losses(data.micro_batches[0]).sum().backward()
        self.exchange.take()
        _raise_if_unused(self.model.module)
        self.optimizer.zero_grad()
        for buffer, saved in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(saved)


def _raise_if_unused(module: nn.Module) -> None:
    """After a first backward: DDP waits for the gradient of every parameter that takes one."""
    unused = [name for name, each in module.named_parameters() if each.requires_grad and each.grad is None]
    if unused:
        rest = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise UsageError(
            f"task: no gradient reaches {', '.join(unused[:3])}{rest} of the model: the loss does not depend on "
            "them; use them in every forward, or freeze them with requires_grad_(False)"
        )


def _phases(row: StepRow) -> dict[str, float]:
    return {phase: getattr(row, f"{phase}_seconds") for phase in PHASES}


def _straggler(rows: list[StepRow]) -> int:
    """The rank with the longest way to its last gradient in the previous step, waiting not counted."""
    own = [row.data_seconds + row.forward_seconds + row.backward_seconds for row in rows]
    return int(np.argmax(own)) if len(rows) > 1 and any(own) else -1
