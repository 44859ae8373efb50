"""Which examples a rank takes in which step, and how they are fetched.

`BatchPlan` is index arithmetic: an epoch is one permutation of the training set that depends on the seed
and the epoch alone; a global batch is a slice of it, a rank's share a slice of the batch, a micro-batch a
slice of the share. Whatever the layout, a step sees the same examples. A step is named by the position in the
epoch where it begins, so that its size may change from one to the next. `batches` fetches them in the rank's own
process and under its generators; `ddp.training.loader` has processes for that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ddp.errors import UsageError
from ddp.job import BatchSection
from ddp.tasks.base import Batch
from ddp.training.columns import collate as collate_examples
from ddp.training.columns import is_column_oriented

OPEN = 1 << 62  # examples of an epoch that nothing ends but the stream itself


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the examples of an epoch are dealt out; all sizes in examples.

    `in_step`: ranks have as many micro-batches as each other in every step, since they meet in each forward. Where a micro-batch
    is to hold one example and shares differ, some then hold two.
    """

    examples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    seed: int
    in_step: bool = False

    def __post_init__(self) -> None:
        _ = self.gradient_accumulation_steps  # refuses a batch smaller than the number of ranks
        if self.world_size > self.examples:
            raise UsageError(
                f"the training set has {self.examples} examples, fewer than the {self.world_size} ranks; "
                "start fewer ranks"
            )

    @property
    def steps_per_epoch(self) -> int:
        """A rest smaller than the number of ranks joins the batch before it. 0 where that is not known."""
        if self.is_open:
            return 0
        full, rest = divmod(self.examples, self.global_batch_size)
        return full + (rest >= self.world_size)

    @property
    def is_open(self) -> bool:
        """Whether the training set is a stream that does not say how long it is."""
        return self.examples == OPEN

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a rank in a full global batch."""
        batch = BatchSection(global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size)
        return batch.gradient_accumulation_steps(self.world_size)

    def batch(self, position: int) -> range:
        """The positions in the epoch's order that a step takes over all ranks, where `position` is the first left.

        A batch ends where the next one begins, whatever sizes came before: each example is taken once an epoch.
        """
        if not 0 <= position <= self.examples - self.world_size:
            raise IndexError(f"position {position} in an epoch of {self.examples} examples for {self.world_size} ranks")
        stop = position + self.global_batch_size
        return range(position, stop if self.examples - stop >= self.world_size else self.examples)

    def share(self, position: int, rank: int) -> range:
        """The part of the batch that `rank` takes: floor or ceiling of an equal share, never empty."""
        return split(self.batch(position), self.world_size)[rank]

    def micro_batches(self, position: int, rank: int, least: int = 1) -> list[range]:
        """The share in parts that differ by at most one and hold 1 to micro_batch_size examples.

        Every rank has as many as the largest share needs, gradient_accumulation_steps in a full batch, and `least`
        where that is more, but none more than it has examples.
        """
        whole, share = len(self.batch(position)), self.share(position, rank)
        return split(share, self.parts(whole, len(share), least))

    def parts(self, whole: int, share: int, least: int = 1) -> int:
        """Micro-batches of a rank that has so many examples of so many."""
        return min(max(self.passes(whole), least), whole // self.world_size if self.in_step else share)

    def passes(self, examples: int) -> int:
        """Micro-batches of the rank with the largest share of so many examples."""
        return -(-examples // (self.world_size * self.micro_batch_size))

    def positions(self, start: int = 0) -> Iterator[int]:
        """Where the steps of an epoch begin, from `start` on."""
        while start <= self.examples - self.world_size:
            yield start
            start = self.batch(start).stop

    def after(self, epoch: int, stop: int) -> tuple[int, int]:
        """Epoch and position of the step that follows one which ends at `stop`; too small a rest is left out."""
        return (epoch, stop) if self.examples - stop >= self.world_size else (epoch + 1, 0)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of all examples for `epoch`, shape (examples,): the same on every rank."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.examples)


@dataclass(frozen=True, slots=True)
class StepData:
    """What one rank trains on in one step."""

    micro_batches: tuple[Batch, ...]
    examples: int  # this rank's, over its micro-batches
    global_examples: int  # over all ranks
    stop: int  # position in the epoch where the next step begins
    positions: tuple[range, ...] = ()  # of each micro-batch in the epoch's order; of a stream there is none


def split(positions: range, parts: int) -> list[range]:
    """Cut into consecutive parts whose lengths differ by at most one."""
    cuts = [len(positions) * part // parts for part in range(parts + 1)]
    return [positions[start:stop] for start, stop in itertools.pairwise(cuts)]


def batches(
    dataset: Dataset[Any],
    plan: BatchPlan,
    rank: int,
    epoch: int,
    start: int = 0,
    least_parts: Callable[[], int] = lambda: 1,
) -> Iterator[StepData]:
    """The steps of `epoch` from position `start` (0 for the first) on; earlier examples are not read.

    `least_parts` is asked before each step for the fewest micro-batches it is to have.
    """
    fetch = fetcher(dataset)
    order = plan.order(epoch)
    for position in plan.positions(start):
        yield fetch_step(fetch, order, plan, rank, position, least_parts())


def fetch_step(
    fetch: Callable[[Sequence[int]], Batch],
    order: NDArray[np.int64],
    plan: BatchPlan,
    rank: int,
    position: int,
    least_parts: int = 1,
) -> StepData:
    """The step that begins at `position` of the epoch with this order, in at least so many micro-batches."""
    parts, whole = plan.micro_batches(position, rank, least_parts), plan.batch(position)
    micro_batches = tuple(fetch(order[part.start : part.stop].tolist()) for part in parts)
    return StepData(micro_batches, sum(map(len, parts)), len(whole), whole.stop, tuple(parts))


def fetcher(dataset: Dataset[Any]) -> Callable[[Sequence[int]], Batch]:
    """A function from indices to a collated batch, by the data set's own `__getitems__` and `collate` if any.

    A column-oriented data set is asked for all at once, a `Subset` as the data set that it is a part of.
    """
    if type(dataset) is Subset and not hasattr(dataset, "collate"):
        fetch, chosen = fetcher(dataset.dataset), dataset.indices
        return lambda indices: fetch([chosen[index] for index in indices])
    get_many: Callable[[Sequence[int]], Any] | None = getattr(dataset, "__getitems__", None)
    collate = collator(dataset)
    if is_column_oriented(dataset):
        return lambda indices: collate(dataset[list(indices)])  # type: ignore[index]  # a list, as its documentation has it
    if get_many is None:
        return lambda indices: collate([dataset[index] for index in indices])
    return lambda indices: collate(get_many(indices))


def collator(dataset: Dataset[Any]) -> Callable[[Any], Batch]:
    """What makes a batch of examples: the data set's own `collate`, or torch's rule, dictionaries column by column."""
    return getattr(dataset, "collate", collate_examples)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each tensor changed, through tuples, lists and mappings; other values stay as they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple takes its values one by one
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(mapped(value, change) for value in batch)
    return batch
