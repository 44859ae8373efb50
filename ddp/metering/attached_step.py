"""A step of an attached script after its backward: what it tells the other ranks, and what comes of all ranks' rows."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future as Answer
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp.metering.closer_look import Look
from ddp.metering.parts import Parts
from ddp.metering.rank_average import rank_average, sampled_squares, unit_fields
from ddp.metering.sampled_squares import SampledSquares
from ddp.noise.shards import ShardWatch
from ddp.noise.tracker import NoiseScaleTracker, StepMoments
from ddp.transport.base import Reduction
from ddp.transport.comm_hook import GradientExchange, add_up
from ddp.transport.row import StepRow

logger = logging.getLogger("ddp.metering")


@dataclass(slots=True)
class StepBehind:
    """An averaged backward whose row is not sent yet.

    Attributes:
        examples: of this rank, all its backwards together.
        weight: t_r, see `ddp.metering.rank_average`.
        scale: of the loss, 0-dim where it is on a device.
        kept: non-zero where gradients had older averages in them.
        sampled: on this and all other ranks.
        look: what sampling showed.
        seconds: from the end of the averaged backward before; NaN for the first.
    """

    reductions: list[Reduction]
    examples: float
    scale: float | Tensor
    kept: Tensor | None
    sampled: bool
    seconds: float
    weight: float = 1.0
    look: Look | None = None

    @property
    def kept_gradients(self) -> bool:
        """Waits for the device."""
        return self.kept is not None and bool(self.kept)


@dataclass(frozen=True, slots=True)
class _OnTheWay:
    """The rows of a step, which a communication thread may still be exchanging; and what they will be read with."""

    answer: Answer[NDArray[np.float64]]
    sampled: bool
    squares: Reduction | None


class AttachedSteps:
    """Sends rows and takes in those that have come.

    Attributes:
        tracker: the windows.
    """

    def __init__(
        self, exchange: GradientExchange, tracker: NoiseScaleTracker, parts: Parts | None, population: float
    ) -> None:
        self.tracker = tracker
        self._exchange = exchange
        self._transport = exchange.transport
        self._parts = parts
        self._population = population
        self._shards = ShardWatch()
        self._rows: deque[_OnTheWay] = deque()
        self._squares_on_the_way: Reduction | None = None
        self._sampled_every = 0
        self._lonely_said = False

    def samples(self, step: int) -> bool:
        """Whether `step`, 1 for the first, is sampled; the same on all ranks that have taken in the same rows."""
        cadence = self.tracker.cadence
        if not cadence.is_due(step):
            return False
        self._sampled_every = cadence.interval(step)
        cadence.took(step)
        return True

    def send_squares(self, step: StepBehind) -> None:
        """What ranks average of a sampled step, beside its row.

        Before the last bucket of the step after, so that one call to `Transport.complete` serves them all.
        """
        self._squares_on_the_way = None
        if not step.sampled:
            return
        squares = sampled_squares(self._parts, step.look, step.examples, step.weight, float(step.scale))
        device = step.reductions[0].bucket.device if step.reductions else torch.device("cpu")
        vector = squares.pack().to(device)
        self._squares_on_the_way = self._transport.all_reduce_mean_(vector, 1.0 / self._transport.world_size)

    def send_row(self, step: StepBehind) -> None:
        """Of the backward before the one under way: its numbers are there without waiting."""
        sums, scale = add_up(step.reductions), float(step.scale)
        own = math.nan if step.kept_gradients else sums.own_squared_norm / scale**2  # NaN: left out on all ranks
        row = StepRow(
            examples=step.examples,
            own_squared_norm=own,
            projection=tuple(value / scale for value in sums.projection),
            backward_seconds=0.0 if math.isnan(step.seconds) else step.seconds,  # the whole step's: see step_seconds
            mean_squared_norm=sums.mean_squared_norm / scale**2,
            measuring_seconds=step.look.seconds if step.look is not None else 0.0,
            **unit_fields(step.look, step.examples, step.weight, scale),
        )
        answer = self._transport.start_row(row.pack())
        self._rows.append(_OnTheWay(answer, step.sampled, self._squares_on_the_way))

    def take_in(self, *, wait: bool) -> None:
        """Enter into the windows the rows that have come, or all that are on their way."""
        while self._rows and (wait or self._rows[0].answer.done()):
            ready = self._rows.popleft()
            packed = self._exchange.attempt(ready.answer.result)
            if packed is not None:
                rows = [StepRow.unpack(each) for each in packed]
                self._exchange.attempt(lambda: self._observe(ready, rows))  # noqa: B023  run at once

    def _observe(self, ready: _OnTheWay, rows: Sequence[StepRow]) -> None:
        self.tracker.cadence.observe(max(row.measuring_seconds for row in rows), max(row.step_seconds for row in rows))
        self.tracker.observe(self._moments(ready, rows), sampled_every=self._sampled_every)
        sentence = self._shards.observe(
            [row.own_squared_norm for row in rows],
            [row.projection for row in rows],
            [row.examples for row in rows],
        )
        self._say(sentence or self._lonely(ready, rows))

    def _moments(self, ready: _OnTheWay, rows: Sequence[StepRow]) -> StepMoments:
        """Of numbers that are the same bits on all ranks, which decide by them: from the rows, or averaged."""
        average, population = rank_average(rows), self._population
        finite = all(math.isfinite(row.own_squared_norm) for row in rows)
        if not finite:
            return StepMoments("none", None)
        plain = average.moments(average.weighted_squared_norms, rows[0].mean_squared_norm, population)
        squares = self._averaged(ready)
        if squares is None:
            return StepMoments(average.method, plain)
        own = average.weighted_preconditioned_norms
        parts = squares.moments(
            *(self._parts, average.units, population), own_factor=average.parts_factor, mean_factor=average.mean_factor
        )
        return StepMoments(average.method, plain, average.moments(own, squares.preconditioned, population), parts)

    def _averaged(self, ready: _OnTheWay) -> SampledSquares | None:
        reduction = ready.squares
        if reduction is None:
            return None
        if reduction.future is not None:
            reduction.future.wait()  # it went out before the rows that have come: on a device the stream waits
        if reduction.error is not None:
            raise reduction.error
        return SampledSquares.unpack(reduction.bucket)

    def _lonely(self, ready: _OnTheWay, rows: Sequence[StepRow]) -> str | None:
        """Once: one rank whose sampled step had one backward."""
        alone = len(rows) == 1 and ready.sampled and not rows[0].units > 1
        if not alone or self._lonely_said:
            return None
        self._lonely_said = True
        return (
            "one rank and one backward a step: nothing to compare its gradient with, so the noise scale stays "
            "unresolved; start more ranks, or accumulate several backwards a step under model.no_sync()"
        )

    def _say(self, sentence: str | None) -> None:
        """All ranks see the same rows: one of them says it."""
        if sentence is not None and self._transport.rank == 0:
            logger.warning(sentence)
