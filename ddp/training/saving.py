"""When a run's state is saved, and how the ranks agree on it: in the rows that they exchange anyway.

A save begins with a copy of the state; a thread of each rank writes its part while training goes on. Each rank's row
says which part it has written last; once all say so, and their parameters were the same, the checkpoint gets its
name. Only at the end, or to stop, do the ranks wait for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp.checkpoint import (
    Manifest,
    Saver,
    Settled,
    clear_left_overs,
    load,
    newest,
    read_manifest,
    set_aside,
)
from ddp.errors import CheckpointError, UsageError
from ddp.job import CheckpointSection
from ddp.tasks.base import Goal
from ddp.training.agreement import from_rank_zero, together
from ddp.training.registry import Registry
from ddp.transport.row import StepRow

logger = logging.getLogger("ddp.training")


@dataclass
class Best:
    """The best values of the metric that checkpoints were saved for; registers itself, so that a resumed run knows them."""

    count: int
    goal: Goal
    metric: str = "loss"
    values: list[float] = field(default_factory=list)

    def enters(self, value: float) -> bool:
        """Whether `value` is better than one of the best `count` so far; it then counts among them."""
        if not self.count or math.isnan(value):
            return False
        sign = 1 if self.goal == "max" else -1
        if len(self.values) == self.count and sign * value <= sign * self.values[-1]:
            return False
        self.values = sorted([*self.values, value], reverse=self.goal == "max")[: self.count]
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "goal": self.goal, "values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another metric's values."""
        same = (state["metric"], state["goal"]) == (self.metric, self.goal)
        self.values = [float(value) for value in state["values"]][: self.count] if same else []


@dataclass(frozen=True, slots=True)
class SaveNews:
    """What came of the checkpoint of `step`."""

    step: int
    ok: bool
    text: str  # one sentence
    duration_seconds: float  # from the copy of the state to everyone's part on the disk
    stall_seconds: float  # for which training stood still


class Saving:
    """One rank's part in the checkpoints of a run.

    Args:
        directory: the run's `checkpoints`, the same on all ranks.
        registry: what is saved.
        metric, goal: of evaluations; which checkpoints are the best.
    """

    def __init__(
        self,
        directory: Path,
        section: CheckpointSection,
        registry: Registry,
        *,
        metric: str,
        goal: Goal,
        rank: int,
        world_size: int,
    ) -> None:
        self.directory, self.registry, self.metric = directory, registry, metric
        self.best = Best(section.keep_best, goal, metric)
        self._rank, self._world_size, self._every_steps = rank, world_size, section.every_steps
        self._every_seconds = section.every_seconds
        self._saver = Saver(
            directory, rank=rank, world_size=world_size, keep=section.keep, keep_best=section.keep_best, goal=goal
        )
        registry.add("best", self.best)
        if rank == 0:
            clear_left_overs(directory)
        self.last_step = -1  # whose state was saved in this run's directory, or restored from there, last
        self.last_value: float | None = None  # of the metric at that step, where it is in the checkpoint
        self._begun_step: int | None = None  # the step of the save that this process began last
        self._unnamed: int | None = None  # that of a checkpoint which is complete, and not known to have its name
        self._began_at, self._stalled_before = time.monotonic(), 0.0  # as of the last save's beginning

    def check(self) -> None:
        """Before the first step: whether all that is registered can be saved. This rank alone.

        Raises:
            UsageError: it cannot; a run would lose all it has done.
        """
        try:
            self._saver.check(self.registry.shared(), self.registry.own())
        except CheckpointError as error:
            raise UsageError(f"task: the run's state cannot be saved: {error}") from error

    @property
    def part_saved(self) -> int:
        """For this rank's row."""
        return self._saver.part_saved

    @property
    def save_due(self) -> bool:
        """For the row of rank 0, by whose clock all ranks go."""
        return time.monotonic() - self._began_at >= self._every_seconds

    def is_due(self, step: int, rows: Sequence[StepRow]) -> bool:
        """Whether to save after `step`, whose rows these are; the same on all ranks."""
        return bool(rows[0].save_due) or (self._every_steps is not None and step % self._every_steps == 0)

    def begin(self, step: int, value: float | None) -> None:
        """Save the state as it is now, in the background; all ranks together, once the save before is settled.

        Args:
            value: of the metric at these weights, where it was taken.
        """
        self.last_step, self.last_value, self._begun_step = step, value, step
        self._began_at, self._stalled_before = time.monotonic(), self._saver.stall_seconds
        self.registry.gather()
        shared = self.registry.shared() if self._rank == 0 else {}
        metric = None if value is None else (self.metric, value)
        self._saver.begin(step, shared, self.registry.own(), metric=metric)

    def observe(self, rows: Sequence[StepRow]) -> list[SaveNews]:
        """After each step: what has become of checkpoints under way; that one has its name only rank 0 knows.

        Raises nothing: what fails costs this checkpoint, and the next one is tried.
        """
        news = self._of_publication()
        if self._saver.pending is None:
            return news
        return news + self._of_settling(self._saver.observe([int(row.part_saved) for row in rows]))

    def settle(self) -> list[SaveNews]:
        """Wait for a checkpoint that is under way, before the next one begins; all ranks together."""
        return self._of_publication() + self._of_settling(self._saver.settle(_everyones))

    def finish(self, step: int, value: float | None) -> tuple[Path, SaveNews]:
        """Save the state as it is now and wait until it is on the disk; all ranks together.

        Raises:
            CheckpointError: a rank could not, on all of them.
        """
        if self.holds(step, value) and self._begun_step != step:  # the run has just come from there
            path = self.newest(step)
            if path is not None and read_manifest(path).step == step:
                return path, self._news(step, True, "was there")
        if self._begun_step != step or not self.holds(step, value):
            self.begin(step, value)
        path = self._saver.finish(_everyones)
        return path, self._news(step, True, "is saved")

    def holds(self, step: int, value: float | None) -> bool:
        """Whether the state after `step` is saved, or on its way, with the metric if there is one."""
        return self.last_step == step and (value is None or self.last_value is not None)

    def _of_settling(self, settled: Settled | None) -> list[SaveNews]:
        if settled is None:
            return []
        if settled.ok:
            self._unnamed = settled.step
            return []
        self.last_step, self._begun_step = -1, -1
        failed = ", ".join(map(str, settled.failed_ranks))
        why = f"rank {failed} could not write its part" if failed else "the next step was not finite"
        return [self._news(settled.step, False, f"was not saved: {why}")]

    def forget(self, step: int) -> None:
        """The state after `step` is another now than what may have been saved as it."""
        if self.last_step == step:
            self.last_step, self.last_value, self._begun_step = -1, None, -1

    def doubt(self, step: int) -> None:
        """The step after `step` is not finite: a checkpoint of `step` that is under way may hold what spoilt it."""
        if self._saver.pending == step:
            self._saver.give_up()

    def _of_publication(self) -> list[SaveNews]:
        step, named = self._unnamed, self._saver.publication
        if step is None or named is None:
            return []
        self._unnamed = None
        return [self._news(step, named, "is saved" if named else f"was not saved: {self._saver.last_error}")]

    def _news(self, step: int, ok: bool, what: str) -> SaveNews:
        stalled = self._saver.stall_seconds - self._stalled_before
        return SaveNews(step, ok, f"the checkpoint of step {step} {what}", time.monotonic() - self._began_at, stalled)

    def newest(self, at_most: int) -> Path | None:
        """The newest checkpoint of this run up to a step that verifies; all ranks together."""
        if self._begun_step is not None:  # published now, or never: what goes with it goes before one is chosen
            try:
                self._saver.finish(_everyones)
            except CheckpointError as error:
                if not error.consequence:
                    logger.warning("%s", error)
        found = together(lambda: newest(self.directory, at_most=at_most) if self._rank == 0 else None)
        said = from_rank_zero("" if found is None else str(found))
        return Path(said) if said else None

    def restore(self, path: Path) -> None:
        """Go on from the checkpoint at `path`, written by any number of ranks; all ranks together.

        The same examples follow in the same global batches. With another number of ranks rank r takes over the running
        statistics of rank r modulo the old number, ranks that are new keep the generators they were seeded with, and
        sums are rounded otherwise: it is not the same run bit for bit.

        Raises:
            CheckpointError: it cannot be read, or belongs to another model or other data; nothing is changed then.
        """

        def load_and_check() -> tuple[dict[str, Any], dict[str, Any], Manifest]:
            shared, own = load(path, self._rank)
            self.registry.check(path, shared, own)
            manifest = read_manifest(path)
            if shared["counters"]["step"] != manifest.step:
                raise CheckpointError(f"{path}: its state is of step {shared['counters']['step']}, not {manifest.step}")
            return shared, own, manifest

        shared, own, manifest = together(load_and_check)
        written_by = manifest.world_size
        missing = self.registry.restore(path, shared, own, newcomer=self._rank >= written_by)
        if path.parent.resolve() == self.directory.resolve():
            self.last_step, self.last_value = manifest.step, self._value_in(manifest)
            if self._rank == 0:
                set_aside(self.directory, manifest.step)
        if self._rank != 0:
            return
        if missing:
            logger.info("%s has no state of %s, which begins afresh", path, ", ".join(missing))
        if written_by != self._world_size:
            logger.warning(
                "%s was written by %d rank(s) and goes on with %d: each example once an epoch as before, but rounding, random "
                "numbers, running statistics, and the batch where its size goes by the ranks, differ, so that it is not bit for "
                "bit the run that it would have been",
                path,
                written_by,
                self._world_size,
            )

    def _value_in(self, manifest: Manifest) -> float | None:
        metric = manifest.metric
        return metric.value if metric is not None and metric.name == self.metric else None

    def roll_back(self, step: int) -> Path | None:
        """Go back from the middle of the step after `step` to the newest checkpoint; all ranks together.

        Where the run has just come from one and the next step fails at once, that one may be what is spoilt, and the one
        before is taken. None where there is none; nothing is changed then.
        """
        path = self.newest(step - 1 if self.last_step == step else step)
        if path is not None:
            self.restore(path)
        return path

    def close(self) -> None:
        """Safe to call twice; what is not published then is lost."""
        self._saver.close()


def _everyones(value: int) -> list[int]:
    """Each rank's number. Collective."""
    values = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([value]))
    return [int(each) for each in values]
