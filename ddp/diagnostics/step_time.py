"""Where the time of a step goes, as a model that can be asked about other batches and numbers of ranks.

    step(R, b) = (f micro-batches + c examples of a rank) (1 + waiting) + a + all-reduce(R)

c is what an example costs a rank, f what a micro-batch costs whatever its size, a what a step costs besides (the
optimizer, bookkeeping, telemetry). All medians over the steps of the run's last part, so that an evaluation or a
checkpoint between two steps does not count. f and c can only be told apart where micro-batches of different sizes were
seen: in the run itself, or in trials of its task (`batch_size_finder`); else f is taken as 0, which promises too
much of many ranks at a small batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ddp.diagnostics.communication import Communication
from ddp.telemetry.records import RunInfo, StepRecord

COMPUTING = ("data", "forward", "backward")  # phases that go with the examples
FEWEST_STEPS = 5  # whose median is worth something
SIZES_APART = 1.5  # largest over smallest micro-batch from which a line through both is worth something

SplitBy = Literal["run", "trials", "nothing"]


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """One step of the run: means over its ranks, and the time until the next step was done."""

    batch_size: int  # of all ranks together, of a step that is no epoch's uneven last
    examples: float  # of one rank
    micro_batches: int  # of one rank
    computing: float  # data, forward, backward
    all_reduce: float
    imbalance: float  # the slowest rank's computing less their mean: what the others wait for
    whole: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients, of one rank, in seconds; and what they were taken from.

    Attributes:
        example_seconds: c.
        micro_batch_seconds: f.
        step_seconds: a.
        all_reduce_seconds: as measured among the run's own ranks.
        waiting_share: of computing, waiting for slower ranks; taken to be the same for any number of ranks. That
            for what rank 0 does besides (its telemetry) is in `step_seconds`.
        micro_batch_size: examples a rank holds at once.
        measured_seconds: the whole step of the run at `measured_batch_size` examples over all ranks, and
            `measured_steps` how many of them there were.
        split_by: what told f from c.
    """

    example_seconds: float
    micro_batch_seconds: float
    step_seconds: float
    all_reduce_seconds: float
    waiting_share: float
    micro_batch_size: int
    measured_seconds: float
    measured_batch_size: int
    measured_steps: int
    split_by: SplitBy

    def computing(self, examples: int) -> float:
        """Seconds that a rank computes on so many examples."""
        return -(-examples // self.micro_batch_size) * self.micro_batch_seconds + examples * self.example_seconds

    def seconds(self, ranks: int, global_batch_size: int, communication: Communication) -> float:
        """One step; the slowest rank has the ceiling of an equal share."""
        waiting = 1.0 + self.waiting_share * (ranks > 1)
        share = -(-global_batch_size // ranks)
        return self.computing(share) * waiting + self.step_seconds + communication.seconds(ranks)

    def affine(self, ranks: int, communication: Communication, *, accumulates: bool) -> tuple[float, float]:
        """(a, c) of a step of a + c b seconds at a global batch of b.

        Args:
            accumulates: whether b grows by more full micro-batches; else a rank holds its share at once, and what a
                micro-batch costs by itself is part of a.
        """
        waiting = 1.0 + self.waiting_share * (ranks > 1)
        each = self.micro_batch_seconds / self.micro_batch_size if accumulates else 0.0
        once = 0.0 if accumulates else self.micro_batch_seconds * waiting
        return self.step_seconds + communication.seconds(ranks) + once, (self.example_seconds + each) * waiting / ranks


def observe(
    info: RunInfo, records: Iterable[StepRecord], held: Callable[[int], int] | None = None
) -> list[StepSeconds]:
    """The steps of the run's last part whose times are known: a record's phases are those of the step before it.

    `held`: the micro-batch size at a global batch size, where it is not the same in all steps.
    """
    own = (record for record in records if record.step > info.start_step)
    return [
        _step(info, before, after, held(before.global_batch_size) if held else info.micro_batch_size)
        for before, after in pairwise(own)
        if after.step == before.step + 1
        and len(after.phase_seconds) == info.world_size
        and any(rank["backward"] for rank in after.phase_seconds)
    ]


def fit(info: RunInfo, steps: Sequence[StepSeconds], trials: Sequence[tuple[int, float]] = ()) -> StepCost | None:
    """The model of the steps of the latest global batch size that has five; None where none has.

    Args:
        trials: (examples, seconds) of forward and backward at several sizes, only to tell f from c where the
            run's own micro-batches were all alike. Only their proportion counts, not how fast the machine was.
    """
    alike = _latest_alike(steps, info.world_size)
    if not alike:
        return None
    batch_size = alike[0].batch_size
    usual = batch_size / info.world_size

    def median(name: str) -> float:
        return statistics.median(getattr(step, name) for step in alike)

    computing, imbalance = median("computing"), median("imbalance")
    all_reduce, whole = median("all_reduce"), median("whole")
    micro_batches = round(median("micro_batches"))
    fixed, split_by = _fixed_share(steps, trials, usual / micro_batches)
    return StepCost(
        example_seconds=(1 - fixed) * computing / usual,
        micro_batch_seconds=fixed * computing / micro_batches,
        step_seconds=max(0.0, whole - computing - imbalance - all_reduce),
        all_reduce_seconds=all_reduce,
        waiting_share=imbalance / computing if computing > 0 else 0.0,
        micro_batch_size=info.micro_batch_size,
        measured_seconds=whole,
        measured_batch_size=batch_size,
        measured_steps=len(alike),
        split_by=split_by,
    )


def _latest_alike(steps: Sequence[StepSeconds], world_size: int) -> list[StepSeconds]:
    """Those of the latest batch size of which enough steps were timed; an epoch's uneven last ones are not."""
    full = [step for step in steps if abs(step.examples * world_size - step.batch_size) <= 0.1 * step.batch_size]
    for batch_size in dict.fromkeys(step.batch_size for step in reversed(full)):
        alike = [step for step in full if step.batch_size == batch_size]
        if len(alike) >= FEWEST_STEPS:
            return alike
    return []


def _step(info: RunInfo, before: StepRecord, after: StepRecord, held: int) -> StepSeconds:
    computing = [sum(rank[phase] for phase in COMPUTING) for rank in after.phase_seconds]
    mean = statistics.fmean(computing)
    return StepSeconds(
        batch_size=before.global_batch_size,
        examples=before.examples / info.world_size,
        micro_batches=-(-before.examples // (info.world_size * held)),
        computing=mean,
        all_reduce=statistics.fmean(rank["all_reduce"] for rank in after.phase_seconds),
        imbalance=max(computing) - mean,
        whole=after.unix_time - before.unix_time,
    )


def _fixed_share(
    steps: Sequence[StepSeconds], trials: Sequence[tuple[int, float]], micro_batch_size: float
) -> tuple[float, SplitBy]:
    """Which share of the time of a micro-batch of that size does not depend on its size, and what told."""
    seen: dict[float, list[float]] = {}
    for step in steps:
        seen.setdefault(step.examples / step.micro_batches, []).append(step.computing / step.micro_batches)
    points = [(size, statistics.median(times)) for size, times in seen.items() if len(times) >= FEWEST_STEPS]
    sources: tuple[tuple[SplitBy, Sequence[tuple[float, float]]], ...] = (("run", points), ("trials", trials))
    for source, of in sources:
        if of and max(of)[0] >= SIZES_APART * min(of)[0]:
            share = _intercept_share(of, micro_batch_size)
            if share < 1.0:  # times that fall with the size are noise
                return share, source
    return 0.0, "nothing"


def _intercept_share(points: Sequence[tuple[float, float]], size: float) -> float:
    """f/(f + c size) of the line with the least relative errors, both coefficients at or above zero."""
    sizes, seconds = np.array(points, dtype=float).T
    terms = np.stack([1 / seconds, sizes / seconds], axis=1)
    fixed, example = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)[0]
    if fixed <= 0:
        return 0.0
    return 1.0 if example <= 0 else float(fixed / (fixed + example * size))
