"""From a run's first step to its last: evaluates and saves on the way, and stops where a rank was asked to."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ddp.errors import StoppedError
from ddp.telemetry.records import EvaluationRecord, EventKind, RunEvent
from ddp.training.course import say_rate
from ddp.training.evaluation import evaluate_splits
from ddp.training.optimizers import weight_decay_penalty
from ddp.training.saving import SaveNews
from ddp.training.trainer import Trainer
from ddp.transport.row import StepRow

logger = logging.getLogger("ddp.training")


@dataclass
class Loop:
    """Around a trainer whose state stands where the run is to go on."""

    trainer: Trainer
    _evaluated_at: int = -1  # step
    _metric: float | None = None  # of the validation set then

    def run(self) -> None:
        """Train to the last step; evaluates and saves at the end, too. All ranks together.

        Raises:
            StoppedError: a rank was asked to stop, and the state is saved.
        """
        trainer, course, saving = self.trainer, self.trainer.course, self.trainer.saving
        self._stop_if(_every_rank_says(trainer.stop.asked))  # while all was being set up
        self._take_over_evaluation()
        if trainer.step_count and self._evaluated_at != trainer.step_count and self._evaluation_is_due():
            self._evaluate()  # a stop in that step came before, or in the evaluation
            self._save_if_due()
        if trainer.rank == 0:
            say_rate(course)
        steps = course.batches(
            trainer.splits.training,
            trainer.rank,
            lambda ahead: trainer.watch.least_parts(trainer.step_count + 1 + ahead),
            trainer.loader,
        )
        while not trainer.is_over:
            before = trainer.step_count
            rows = trainer.step(steps)
            self._say_saved(saving.observe(rows))
            if trainer.step_count <= before:  # it went back
                self._evaluated_at = -1
            self._stop_if([bool(row.stop) for row in rows])
            if trainer.step_count > before and self._evaluation_is_due():
                self._evaluate()
            self._save_if_due(rows)
        if self._evaluated_at != trainer.step_count:
            self._evaluate()
        self._end_early()
        self._save_and_wait()
        trainer.board.enter("end", trainer.step_count)

    def _evaluation_is_due(self) -> bool:
        section, step = self.trainer.job.evaluation, self.trainer.step_count
        if section.every_steps is not None:
            return step % section.every_steps == 0
        return self.trainer.course.has_finished_epochs(section.every_epochs or 1)

    def _evaluate(self) -> None:
        """Both splits; a signal meanwhile stops the run, whose next part begins with them."""
        record, ending = self._evaluation(), self.trainer.early_stopping
        if record is not None and ending is not None:
            value = record.value(ending.section.monitor)
            due = self._evaluation_is_due()
            ending.observe(record.step, record.epoch, math.nan if value is None else value, due=due)

    def _end_early(self) -> None:
        """Say that the run stopped early, if it did; bring the best weights back, if that is asked for."""
        trainer, ending = self.trainer, self.trainer.early_stopping
        if ending is None or ending.restored:
            return
        if ending.stopped:
            trainer.say("stopped_early", ending.in_words(trainer.step_count))
        if ending.restore(trainer.step_count):
            trainer.saving.forget(trainer.step_count)
            self._evaluation()

    def _evaluation(self) -> EvaluationRecord | None:
        """Of the weights as they are; of the validation set, None where a signal came."""
        trainer = self.trainer
        trainer.board.enter("evaluation", trainer.step_count)
        records = evaluate_splits(
            *(trainer.task, trainer.model.module, trainer.splits),
            step=trainer.step_count,
            epoch=trainer.course.epochs_done,
            rank=trainer.rank,
            world_size=trainer.world_size,
            batch_size=max(64, trainer.plan.micro_batch_size),
            device=trainer.device,
            asked_to_stop=lambda: trainer.stop.asked,
            averaged=trainer.averaged.module if trainer.averaged is not None and trainer.averaged.updates else None,
            forward_context=trainer.passes.forward_context,
            penalty=weight_decay_penalty(trainer.optimizer),
        )
        if records is None:
            self._stop_if(_every_rank_says(trainer.stop.asked))
        for record in records or ():
            trainer.sinks.evaluation(record)
            self._evaluated_at, self._metric = trainer.step_count, record.value(trainer.job.evaluation.metric)
        self._follow(records or ())
        return records[-1] if records else None

    def _follow(self, records: Sequence[EvaluationRecord]) -> None:
        """A plateau counts what is due alone: where the run ends there may be one that a longer run would not have had."""
        trainer, job = self.trainer, self.trainer.job
        for record in records:
            value = record.value(job.schedule.metric or job.evaluation.metric)
            if record.split == "validation" and value is not None and self._evaluation_is_due():
                news = trainer.course.take_evaluation(trainer.step_count, value)
                if news and trainer.rank == 0:
                    logger.info("step %d: %s", trainer.step_count, news)

    def _metric_now(self) -> float | None:
        """Of the validation set at the weights as they are now, where it was taken."""
        return self._metric if self._evaluated_at == self.trainer.step_count else None

    def _take_over_evaluation(self) -> None:
        """The checkpoint that the run has come from may have been evaluated."""
        saving = self.trainer.saving
        if saving.last_step == self.trainer.step_count and saving.last_value is not None:
            self._evaluated_at, self._metric = saving.last_step, saving.last_value

    def _save_if_due(self, rows: Sequence[StepRow] = ()) -> None:
        """After a step with these rows, or after an evaluation that makes up for one that a stop came before."""
        step, saving, value = self.trainer.step_count, self.trainer.saving, self._metric_now()
        is_best = value is not None and saving.best.enters(value)
        if self.trainer.is_over or saving.holds(step, value):
            return  # the end saves
        if is_best or (rows and saving.is_due(step, rows)):
            self.trainer.board.enter("save", step)
            self.trainer.replicas.take(step)  # compared in the next row, before the checkpoint gets its name
            self._say_saved(saving.settle())  # the disk may be slower than checkpoints come
            saving.begin(step, value)

    def _save_and_wait(self) -> Path:
        self.trainer.board.enter("save", self.trainer.step_count)
        self.trainer.replicas.compare_now(self.trainer.step_count)
        self._say_saved(self.trainer.saving.settle())
        path, news = self.trainer.saving.finish(self.trainer.step_count, self._metric_now())
        self._say_saved([news])
        return path

    def _stop_if(self, asked: Sequence[bool]) -> None:
        """Save and stop where any rank was asked to. Before an evaluation, which may take long."""
        if any(asked):
            path = self._save_and_wait()
            by = self.trainer.stop.signal_name or f"a signal to rank {list(asked).index(True)}"
            raise StoppedError(f"stopped by {by} after step {self.trainer.step_count}; go on with --resume {path}")

    def _say_saved(self, news: Sequence[SaveNews]) -> None:
        for each in news:
            kind: EventKind = "saved" if each.ok else "save_failed"
            seconds = (each.duration_seconds, each.stall_seconds)
            self.trainer.sinks.event(RunEvent(each.step, time.time(), kind, -1, each.text, *seconds))


def _every_rank_says(asked: bool) -> list[bool]:
    """In rank order. Collective."""
    says = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(says, torch.tensor([float(asked)]))
    return [bool(each) for each in says]
