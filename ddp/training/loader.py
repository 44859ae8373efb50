"""Micro-batches fetched ahead by worker processes, in the very order in which training takes them.

Worker k of n fetches the k-th, (k + n)-th, ... micro-batch to come, as far ahead as `prefetch` says. What comes depends on
the plan, which may change at a step: a batch that adapts itself, one rank's step in halves, a run set back to a
checkpoint. Each micro-batch that is there is therefore compared with the one that is wanted; if it is another, all that
was fetched ahead is thrown away and fetching begins anew from there. Nothing is skipped or taken twice.

In its own process a rank fetches under its own generators, which are in checkpoints. A worker fetches each micro-batch
under generators seeded from the run's seed, the epoch and the position of its first example alone, so that a resumed
run, or one with another number of workers, gets the same batches, and the rank's generators are not drawn from.
Data that augments at random is thus another draw with workers than without; data that does not is the same. A generator
that a data set keeps for itself is not seeded: each worker has its own copy of it.

Workers draw an epoch's order themselves, as the rank would. Where it follows losses only the rank can: it tells them each
epoch's order, and nothing of an epoch is fetched before the one before has ended.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ddp.errors import LoaderError, UsageError
from ddp.job import DataSection
from ddp.tasks.base import Batch
from ddp.training.agreement import together
from ddp.training.data import BatchPlan, StepData
from ddp.training.sampling import Sampler, Uniform
from ddp.training.workers import Failed, Request, Worker, end_all

logger = logging.getLogger("ddp.training")

READY_SECONDS, ATTEMPTS = 20.0, 3  # for a worker to come up, and how often one is forked

LeastParts = Callable[[int], int]  # how many micro-batches the step so many ahead has at least; 0: the next


class Loader:
    """The workers of one rank; `opened_loader` makes one."""

    def __init__(self, section: DataSection, rank: int, sampler: Sampler | None = None) -> None:
        self._sampler = sampler or Uniform()
        self._told: NDArray[np.int64] | None = None  # the order that workers have been told
        self.workers: list[Worker] = []
        self._section, self._rank = section, rank
        self._depth = section.prefetch * section.workers  # micro-batches that are asked for and not taken
        self._turns = count()  # whose turn it is to be asked
        self._ahead: deque[tuple[Worker, Request | None]] = deque()  # asked for; None: not wanted any more
        self._to_come: Iterator[Request] = iter(())
        self._steps = 0

    def start(self, dataset: Dataset[Any], plan: BatchPlan, cores: Collection[int] | None) -> None:
        """Fork the workers, which may use `cores`; they wait to be asked.

        Raises:
            UsageError: the system has no room for them.
        """
        try:
            for number in range(self._section.workers):
                self.workers.append(Worker(number, self._rank, dataset, plan, cores, self._sampler))
            for number in range(self._section.workers):
                self._see_it_come_up(
                    number, lambda number=number: Worker(number, self._rank, dataset, plan, cores, self._sampler)
                )
        except OSError as error:
            raise UsageError(
                f"data.workers: process {len(self.workers)} of {self._section.workers} of rank {self._rank} cannot be "
                f"started: {error.strerror}; lower it, or raise the limit of processes, memory or open files"
            ) from error

    def _see_it_come_up(self, number: int, fork: Callable[[], Worker]) -> None:
        for _ in range(ATTEMPTS - 1):
            if self.workers[number].is_ready(READY_SECONDS):
                return
            self.workers[number].end()
            self.workers[number] = fork()
        if not self.workers[number].is_ready(READY_SECONDS):
            raise LoaderError(
                f"data: worker {number} of rank {self._rank} does not come up, {ATTEMPTS} times in a row; with data.workers "
                "= 0 the rank fetches itself"
            )

    def step(self, plan: BatchPlan, epoch: int, position: int, least_parts: LeastParts) -> StepData:
        """The step that begins at `position` of `epoch`, in at least `least_parts(0)` micro-batches."""
        self._steps += 1
        if self._sampler.follows_losses:
            self._tell(self._sampler.order(plan, epoch), epoch)
        parts, whole = plan.micro_batches(position, self._rank, least_parts(0)), plan.batch(position)
        wanted = [Request(epoch, part.start, part.stop) for part in parts]
        to_come = partial(self._requests, plan, epoch, whole.stop, least_parts)
        micro_batches = tuple(self._take(wanted[index:], to_come) for index in range(len(wanted)))
        return StepData(micro_batches, sum(map(len, parts)), len(whole), whole.stop, tuple(parts))

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        end_all(self.workers)

    def _tell(self, order: NDArray[np.int64], epoch: int) -> None:
        """Let the workers have the order of `epoch`, unless they have it; what they fetch by another is not wanted."""
        if order is self._told:
            return
        for worker in self.workers:
            worker.tell(order, epoch)
        self._told = order
        self._ahead = deque((worker, None) for worker, _ in self._ahead)

    def _take(self, wanted: list[Request], to_come: Callable[[], Iterator[Request]]) -> Batch:
        """The first of what is wanted of a step; asks for as much more."""
        if not self._ahead or self._ahead[0][1] != wanted[0]:
            self._ahead = deque((worker, None) for worker, _ in self._ahead)
            self._to_come = chain(wanted, to_come())
            self._fill()
        while True:
            worker, request = self._ahead.popleft()
            answer = worker.answer()
            self._fill()
            if request is None:
                continue
            if isinstance(answer, Failed):
                logger.error("data: in worker %d of rank %d\n%s", worker.number, self._rank, answer.traceback.rstrip())
                raise worker.failure(answer, request)
            return answer

    def _fill(self) -> None:
        while len(self._ahead) < self._depth and (request := next(self._to_come, None)) is not None:
            worker = self.workers[next(self._turns) % len(self.workers)]
            worker.ask(request)
            self._ahead.append((worker, request))

    def _requests(self, plan: BatchPlan, epoch: int, stop: int, least_parts: LeastParts) -> Iterator[Request]:
        """All that comes after the step that ends at `stop` of `epoch`, if the plan stays as it is, so far as it is known."""
        began_in = epoch
        for step in count(self._steps + 1):
            epoch, position = plan.after(epoch, stop)
            if epoch != began_in and self._sampler.follows_losses:
                return
            stop = plan.batch(position).stop
            for part in plan.micro_batches(position, self._rank, least_parts(step - self._steps)):
                yield Request(epoch, part.start, part.stop)


@contextmanager
def opened_loader(
    section: DataSection,
    dataset: Dataset[Any],
    plan: BatchPlan,
    rank: int,
    cores: Collection[int] | None,
    sampler: Sampler | None = None,
) -> Iterator[Loader | None]:
    """The rank's workers for a while, None where the job has none. Collective at its beginning."""
    if not section.workers:
        yield None
        return
    loader = Loader(section, rank, sampler)
    try:
        together(lambda: loader.start(dataset, plan, cores))
        yield loader
    finally:
        loader.close()
