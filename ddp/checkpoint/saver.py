"""Saving off the step's path: copy, go on, and agree in a later step's row on what has become of it.

begin      all ranks, in the same step: copies into staging memory and returns; a thread writes
observe    all ranks, every step, with everyone's `part_saved` of the step's row: once all have written, rank 0's
           thread publishes
finish     all ranks: the same for what is pending, waited for
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.checkpoint.background import Background
from ddp.checkpoint.names import SHARED, Metric, directory_name, partial_name, rank_file
from ddp.checkpoint.ownership import reason
from ddp.checkpoint.publishing import Retention, publish, remove_others, write_parts
from ddp.checkpoint.staging import Part, Staging, check
from ddp.errors import CheckpointError

CLOSE_SECONDS = 20.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of the save of `step`: every rank's part is written, or those of `failed_ranks` could not be.

    Where neither is so it was given up.
    """

    step: int
    ok: bool
    failed_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Save:
    """One save; `number` counts this process's, the same on all ranks."""

    number: int
    step: int
    metric: Metric | None
    partial: Path
    final: Path


class Saver:
    """One rank's side of saving a run's checkpoints; every rank has one, and calls it in the same steps.

    Args:
        directory: the run's `checkpoints`, the same on all ranks; made where it is missing.
        keep, keep_best, goal: see `Retention`.
    """

    def __init__(
        self, directory: Path, *, rank: int, world_size: int, keep: int, keep_best: int = 0, goal: str = "max"
    ) -> None:
        self._directory, self._rank, self._world_size = directory, rank, world_size
        self._retention = Retention(keep, keep_best, goal)
        self._staging = {SHARED: Staging(), rank_file(rank): Staging()}
        self._background = Background("ddp-checkpoint")
        self._closing = threading.Event()
        self._count = 0
        self._pending: _Save | None = None
        self._last: tuple[_Save, Settled] | None = None
        self._fault: Exception | None = None  # of this rank's part of the last save
        self._given_up = 0  # the number of the last save that is to get no name
        self._writing: Future[None] | None = None
        self._publishing: Future[None] | None = None
        self.part_saved = 0  # what this rank's row says: the number of the save that it wrote, minus it if it could not
        self.published: Path | None = None  # rank 0: the newest
        self.last_error: str | None = None
        self.stall_seconds = 0.0  # that the caller was held up, in all

    @property
    def pending(self) -> int | None:
        """The step whose save was begun and is not settled."""
        return None if self._pending is None else self._pending.step

    @property
    def publication(self) -> bool | None:
        """Whether the save that was settled last has its name; None while that is not known, and on ranks other than 0."""
        if self._publishing is None or not self._publishing.done():
            return None
        return self._publishing.exception() is None

    # --- what all ranks call ---

    def check(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Before the first step: whether what `begin` will be given can be saved. This rank alone.

        Raises:
            CheckpointError: it cannot, and what of it.
        """
        check(SHARED, shared)
        check(rank_file(self._rank), own)

    def begin(
        self, step: int, shared: Mapping[str, Any], own: Mapping[str, Any], metric: tuple[str, float] | None = None
    ) -> None:
        """Copy what is to be saved, and go on. What cannot be saved is this rank's failure, told by `part_saved`.

        Args:
            step: optimizer steps taken so far.
            shared: what all ranks hold alike; only rank 0's is written, the others may pass `{}`.
            own: what this rank alone holds.
            metric: a validation metric's name and value if it was taken at this very step; the same on all ranks.
        """
        if self._pending is not None:
            raise RuntimeError(f"step {self._pending.step} is still being saved: finish before step {step} begins")
        with self._stalling():
            self._count += 1
            named = None if metric is None else Metric(metric[0], float(metric[1]), self._retention.goal)
            save = _Save(
                *(self._count, step, named, self._directory / partial_name(step, self._count)),
                final=self._directory / directory_name(step, named),
            )
            self._pending, self._fault = save, None
            parts: list[Part] = []
            try:
                if self._rank == 0:
                    parts.append(self._staging[SHARED].stage(SHARED, shared))
                name = rank_file(self._rank)
                parts.append(self._staging[name].stage(name, own))
            except Exception as fault:  # also a device's: all ranks have to hear of it
                self._fail(save, fault)
                self._writing = None
            else:
                self._writing = self._background.submit(lambda: self._write(save, parts))

    def observe(self, everyones: Sequence[int]) -> Settled | None:
        """Hand in each rank's `part_saved`, in rank order, the same on all ranks; what that settles, if anything."""
        save = self._pending
        if save is None or any(abs(each) != save.number for each in everyones):
            return None
        if self._fault is not None:
            logger.warning("%s; the run goes on", self._own_failure(save, self._fault))
        return self._settle(save, everyones, quiet=False)

    def give_up(self) -> None:
        """What is pending gets no name: what came after showed it to be spoilt. All ranks, in the same step."""
        if self._pending is not None:
            self._given_up = self._pending.number

    def settle(self, gather: Callable[[int], list[int]]) -> Settled | None:
        """What `observe` does, waited for; None where nothing is pending. A failure is a warning and the run goes on."""
        with self._stalling():
            if self._pending is None:
                return None
            self._await(self._writing)
            return self.observe(gather(self.part_saved))

    def finish(self, gather: Callable[[int], list[int]]) -> Path:
        """Wait until what was begun last is published; all ranks together.

        Args:
            gather: hands over this rank's number and returns everyone's in rank order; called on all ranks equally often.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: a rank could not write its part, or rank 0 not publish; on all ranks. Nothing of this
                checkpoint stays; older ones do.
        """
        with self._stalling():
            self._await(self._writing)
            if self._pending is not None:
                self._settle(self._pending, gather(self.part_saved), quiet=True)
            if self._last is None:
                raise RuntimeError("nothing was begun that could be finished")
            save, settled = self._last
            self._await(self._publishing)
            fault = self._publishing.exception() if self._publishing is not None else None
            everyones = gather(-save.number if settled.ok and fault is not None else save.number)
        if self._fault is not None:
            raise CheckpointError(self._own_failure(save, self._fault)) from self._fault
        if settled.ok and fault is not None:
            raise CheckpointError(self._own_failure(save, fault)) from fault
        failed = settled.failed_ranks or tuple(rank for rank, each in enumerate(everyones) if each < 0)
        if failed:
            error = CheckpointError(
                f"{save.final}: step {save.step} is not saved, because rank {', '.join(map(str, failed))} could not; "
                "see its message"
            )
            error.consequence = True
            raise error
        if not settled.ok:
            error = CheckpointError(f"{save.final}: step {save.step} was given up")
            error.consequence = True  # of what the run has told already
            raise error
        return save.final

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """End the thread: what is being written is given up, what is being published is completed. Never raises."""
        self._closing.set()
        with suppress(Exception):
            if not self._background.close(timeout_seconds):
                logger.warning("%s: still writing after %g s; not waited for", self._directory, timeout_seconds)
            elif self._pending is not None and self._rank == 0:
                shutil.rmtree(self._pending.partial, ignore_errors=True)

    # --- what the thread does ---

    def _write(self, save: _Save, parts: Sequence[Part]) -> None:
        try:
            write_parts(save.partial, parts, self._raise_if_closing)
        except BaseException as fault:
            self._fail(save, fault if isinstance(fault, Exception) else RuntimeError(repr(fault)))
        else:
            self.part_saved = save.number

    def _publish(self, save: _Save, quiet: bool) -> None:
        try:
            publish(save.partial, save.final, save.step, self._world_size, save.metric)
        except Exception as fault:
            shutil.rmtree(save.partial, ignore_errors=True)
            self.last_error = self._own_failure(save, fault)
            if not quiet:
                logger.warning("%s; the run goes on", self.last_error)
            raise
        self.published = save.final
        try:
            remove_others(self._directory, save.step, self._retention)
        except (OSError, CheckpointError) as fault:
            logger.warning("%s: cannot look for old checkpoints: %s", self._directory, reason(fault))

    def _raise_if_closing(self) -> None:
        if self._closing.is_set():
            raise CheckpointError("the run ended before it was written")

    # --- on the way ---

    def _settle(self, save: _Save, everyones: Sequence[int], *, quiet: bool) -> Settled:
        failed = tuple(rank for rank, each in enumerate(everyones) if each != save.number)
        settled = Settled(save.step, not failed and save.number != self._given_up, failed)
        self._pending, self._last, self._publishing = None, (save, settled), None
        if self._rank == 0 and settled.ok:
            self._publishing = self._background.submit(lambda: self._publish(save, quiet))
        elif self._rank == 0:
            self._background.submit(lambda: shutil.rmtree(save.partial, ignore_errors=True))
        return settled

    def _fail(self, save: _Save, fault: Exception) -> None:
        self._fault, self.last_error = fault, self._own_failure(save, fault)
        self.part_saved = -save.number

    def _own_failure(self, save: _Save, fault: BaseException) -> str:
        return f"{save.final}: rank {self._rank} could not save step {save.step}: {reason(fault)}"

    def _await(self, future: Future[None] | None) -> None:
        if future is not None:
            wait([future])

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - began
