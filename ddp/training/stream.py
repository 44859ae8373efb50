"""A training set that is a stream: how the ranks share it out, step by step, and agree on where it ends.

A stream that has `shard(num_shards=, index=)`, as HuggingFace's `IterableDataset` has it, gives each rank a part of its own
to read. Any other one is read by all ranks, and of each batch rank r trains on the examples at r, r + ranks, ...: a step then
sees the same examples whatever the layout. Either way shares are the floor and the ceiling of the batch.

Before each step the ranks tell each other, in one collective, how large a batch they can have their share of and whether
their stream ends after it. Where one ends, the pass ends for all: what the others have left is left out. A rest of a stream
that all ranks read joins the batch before where it is smaller than the number of ranks, so that nothing is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset

from ddp.errors import CheckpointError, UsageError
from ddp.tasks.base import Batch
from ddp.training.agreement import together
from ddp.training.data import OPEN, BatchPlan, StepData, collator, split
from ddp.training.stream_source import Source

logger = logging.getLogger("ddp.training")


def is_stream(dataset: object) -> bool:
    """Whether it is read in the order in which it comes, and has no examples by number."""
    return isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    )


def declared_examples(task: object, dataset: object) -> int:
    """`examples_per_epoch` of the data set or of the task, or the data set's length; OPEN where there is none.

    Raises:
        UsageError: it is no number of examples.
    """
    for owner in (dataset, task):
        if (declared := getattr(owner, "examples_per_epoch", None)) is not None:
            if type(declared) is not int or not 0 < declared < OPEN:
                raise UsageError(f"task: examples_per_epoch is {declared!r}, not a number of examples")
            return declared
    try:
        return len(dataset) or OPEN  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # how data sets say that they have no length
        return OPEN


class Stream:
    """One rank's reading of the training set."""

    def __init__(self, dataset: Dataset[Any], rank: int, world_size: int, *, seed: int, shuffle_buffer: int) -> None:
        self._rank, self._world_size = rank, world_size
        part = _part(dataset, rank, world_size)
        self.is_sharded = part is not None
        self._collate = collator(dataset)
        self.source = Source(
            dataset if part is None else part,
            shuffle_buffer=shuffle_buffer,
            seed=(seed, rank) if self.is_sharded else (seed,),
        )

    def first(self, plan: BatchPlan) -> Batch:
        """Examples like those of a first micro-batch, which stay to be trained on. Collective."""

        def look() -> list[Any]:
            examples = self.source.look(min(plan.micro_batch_size, -(-plan.global_batch_size // self._world_size)))
            if not examples:
                raise UsageError(f"task: the training stream of rank {self._rank} has no examples")
            return examples

        return self._collate(together(look))

    def step(self, plan: BatchPlan, position: int, least_parts: int = 1) -> StepData:
        """The step at `position` of the epoch. Collective.

        Raises:
            UsageError: a pass holds fewer examples than there are ranks, or the ranks read different streams; on all ranks.
        """
        pass_number, wanted = self.source.passes, len(plan.batch(position))
        own, most, ends = self._read(wanted)
        said = _everyones(most, ends, self._world_size)
        total, is_last = min(size for size, _ in said), any(ends for _, ends in said)
        self._check(said, total, pass_number)
        own = own[: self._share(total)]
        parts = split(range(len(own)), plan.parts(total, len(own), least_parts))
        micro_batches = tuple(self._collate(own[part.start : part.stop]) for part in parts)
        if is_last:
            self._say_end(said, pass_number)
            self.source.next_pass()
        return StepData(micro_batches, len(own), total, plan.examples if is_last else position + total)

    def state_dict(self) -> dict[str, Any]:
        """This rank's own where the stream is sharded; otherwise the same on all ranks."""
        return {"world_size": self._world_size if self.is_sharded else None, **self.source.state_dict()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        here = self._world_size if self.is_sharded else None
        if state["world_size"] != here:
            was, now = (
                f"by shard() among {size} ranks" if size else "by reading all" for size in (state["world_size"], here)
            )
            raise CheckpointError(
                f"the training stream was shared out {was}, now it is {now}: which examples were trained on cannot be told; "
                "go on with as many ranks as before"
            )
        self.source.check_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)

    def _read(self, wanted: int) -> tuple[list[Any], int, bool]:
        """Own examples of a batch of `wanted`, the largest batch whose share this rank has, and whether its stream ends."""
        if self.is_sharded:
            own = [self.source.take() for _ in self.source.look(self._share(wanted))]
            self.source.mark()
            most = wanted if len(own) == self._share(wanted) else len(own) * self._world_size + self._rank
            return own, most, not self.source.look(1)
        own, taken = self._deal(0, wanted)
        self.source.mark()
        if len(self.source.look(self._world_size)) == self._world_size:
            return own, taken, False
        rest, taken = self._deal(taken, OPEN)
        return [*own, *rest], taken, True

    def _deal(self, first: int, end: int) -> tuple[list[Any], int]:
        """Of the examples `first` to `end` of a batch that all ranks read: this rank's, and where the stream ends."""
        own: list[Any] = []
        while first < end and self.source.look(1):
            example = self.source.take()
            if first % self._world_size == self._rank:
                own.append(example)
            first += 1
        return own, first

    def _share(self, batch: int) -> int:
        """Of a batch that is dealt out in turn."""
        return len(range(self._rank, batch, self._world_size))

    def _check(self, said: list[list[int]], total: int, pass_number: int) -> None:
        sizes = [size for size, _ in said]
        if not self.is_sharded and min(said) != max(said):
            raise UsageError(
                f"task: the ranks read different training streams: in pass {pass_number} one rank finds {min(sizes)} examples "
                f"where another finds {max(sizes)}: give all ranks the same examples in the same order, or give the data "
                "set shard(num_shards=, index=)"
            )
        if total < self._world_size:
            where = f", of which rank {sizes.index(total)} reads too few" if self.is_sharded else ""
            raise UsageError(
                f"task: pass {pass_number} of the training stream has not even an example for each of the "
                f"{self._world_size} ranks{where}: start fewer ranks, or check its data"
            )

    def _say_end(self, said: list[list[int]], pass_number: int) -> None:
        ended = [rank for rank, (_, ends) in enumerate(said) if ends]
        if self._rank or pass_number or len(ended) == self._world_size:
            return
        logger.info(
            "the training stream of rank %s ends before the others': its end is the pass's, and what they have left of theirs "
            "is left out, in every pass",
            ", ".join(map(str, ended)),
        )


def _part(dataset: Any, rank: int, world_size: int) -> Any | None:
    """This rank's own part of the stream; None where it cannot be cut into as many equal ones."""
    pieces = getattr(dataset, "num_shards", world_size)
    if world_size == 1 or not callable(getattr(dataset, "shard", None)) or pieces % world_size:
        return None
    return dataset.shard(num_shards=world_size, index=rank)


def _everyones(most: int, ends: bool, world_size: int) -> list[list[int]]:
    """What each rank says, in rank order. Collective."""
    own = torch.tensor([most, ends], dtype=torch.int64)
    if world_size == 1:
        return [own.tolist()]
    everyones = [torch.zeros_like(own) for _ in range(world_size)]
    dist.all_gather(everyones, own)
    return [each.tolist() for each in everyones]
