"""Time and cost to one loss on other numbers of ranks: what communication takes, and what the noise scale takes.

Two ways to use more ranks are kept apart. With the *same* global batch the steps stay as many and each gets shorter,
until communication and the fixed cost of a step are all that is left. With a batch that *grows* with the ranks a
step stays as long and fewer are needed, until the noise scale says that more examples a step add little
(`ddp.noise.efficiency`). The ends of the noise scale's interval are carried through to both ends of each result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ddp.diagnostics.communication import Communication
from ddp.diagnostics.step_time import StepCost
from ddp.noise.efficiency import between, data_efficiency, fastest_batch, steps_ratio
from ddp.noise.estimate import Estimate

PAYS = 1.5  # twice the ranks pay where they make a run at least so much faster
MOST_RANKS = 1 << 20


@dataclass(frozen=True, slots=True)
class Baseline:
    """The run whose loss is to be reached: its batch, its ranks, and how many steps of that batch it took."""

    global_batch_size: int
    world_size: int
    steps: float
    training_examples: int

    def grown(self, ranks: int) -> int:
        """The global batch with as many examples a rank as in the run, at least one."""
        return max(ranks, round(self.global_batch_size * ranks / self.world_size))


@dataclass(frozen=True, slots=True)
class Projected:
    """One way to the loss of the baseline.

    Attributes:
        step_seconds: one step; `seconds` all of them; `rank_hours` those times the ranks.
        steps: over those of the baseline.
        data_efficiency: examples that a tiny batch would need, over those that this one does. None for an unknown
            noise scale, and so is `learning_rate_factor`: by the optimizer's rule, over the run's learning rate.
    """

    ranks: int
    global_batch_size: int
    step_seconds: float
    steps: Estimate
    seconds: Estimate
    rank_hours: Estimate
    data_efficiency: Estimate | None = None
    learning_rate_factor: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """So many ranks, both ways. None where there is none: fewer examples than ranks, or more than the training set.

    `fastest_batch` is the global batch that reaches the loss soonest on so many ranks: sqrt(B a / c), where a micro-batch's
    own cost goes to a while each rank holds its share at once, and to c beyond.
    """

    ranks: int
    same: Projected | None
    grown: Projected | None
    fastest_batch: Estimate | None


@dataclass(frozen=True, slots=True)
class StopsPaying:
    """From how many ranks on doubling them makes a run less than `PAYS` times as fast, at B and at its ends.

    Attributes:
        ranks, low, high: powers of two; None where doubling still pays at `limit`, the most that the way admits.
        cost: rank-hours at `ranks` (or `limit`) over those of one rank.
    """

    ranks: int | None
    low: int | None
    high: int | None
    limit: int
    cost: Estimate


@dataclass(frozen=True, slots=True)
class Scaling:
    """The model put together; `noise_scale` None where nothing is known of it."""

    baseline: Baseline
    cost: StepCost
    communication: Communication
    noise_scale: Estimate | None
    learning_rate_factor: Callable[[float, float, float], float]  # of (B, batch before, batch after)

    def rows(self, ranks: Sequence[int]) -> tuple[Row, ...]:
        return tuple(Row(each, self.same(each), self.grown(each), self._fastest_batch(each)) for each in ranks)

    def same(self, ranks: int) -> Projected | None:
        """The global batch stays: exact in the steps, whatever the noise scale."""
        batch = self.baseline.global_batch_size
        return self._projected(ranks, batch) if ranks <= batch else None

    def grown(self, ranks: int) -> Projected | None:
        """Each rank keeps its examples a step."""
        batch = self.baseline.grown(ranks)
        is_known = self.noise_scale is not None and batch <= self.baseline.training_examples
        return self._projected(ranks, batch) if is_known else None

    def same_stops_paying(self) -> StopsPaying:
        batch = self.baseline.global_batch_size
        return self._stops(lambda ranks: batch, Estimate.exactly(0.0), _power_of_two(batch))

    def grown_stops_paying(self) -> StopsPaying | None:
        """None for an unknown noise scale, and where even one rank's share is more than the training set."""
        grown, examples = self.baseline.grown, self.baseline.training_examples
        if self.noise_scale is None or grown(1) > examples:
            return None
        limit = 1
        while limit < MOST_RANKS and grown(2 * limit) <= examples:
            limit *= 2
        return self._stops(grown, self.noise_scale, limit)

    def _seconds(self, ranks: int, batch: int, noise_scale: float) -> float:
        """To the baseline's loss, if B were exactly that."""
        steps = self.baseline.steps * steps_ratio(noise_scale, self.baseline.global_batch_size, batch)
        return steps * self.cost.seconds(ranks, batch, self.communication)

    def _projected(self, ranks: int, batch: int) -> Projected:
        noise_scale, before = self.noise_scale, self.baseline.global_batch_size
        steps = Estimate.exactly(1.0)
        if batch != before and noise_scale is not None:
            steps = between(lambda b: steps_ratio(b, before, batch), noise_scale)
        step_seconds = self.cost.seconds(ranks, batch, self.communication)
        seconds = _scaled(steps, self.baseline.steps * step_seconds)
        return Projected(
            ranks=ranks,
            global_batch_size=batch,
            step_seconds=step_seconds,
            steps=steps,
            seconds=seconds,
            rank_hours=_scaled(seconds, ranks / 3600),
            data_efficiency=noise_scale and between(lambda b: data_efficiency(b, batch), noise_scale),
            learning_rate_factor=noise_scale
            and between(lambda b: self.learning_rate_factor(b, before, batch), noise_scale),
        )

    def _fastest_batch(self, ranks: int) -> Estimate | None:
        if self.noise_scale is None:
            return None
        held, most = ranks * self.cost.micro_batch_size, self.baseline.training_examples
        at_once = self.cost.affine(ranks, self.communication, accumulates=False)
        accumulating = self.cost.affine(ranks, self.communication, accumulates=True)

        def fastest(b: float) -> float:
            full = held * round(min(fastest_batch(b, *accumulating), most) / held)  # a part of one costs a whole one
            return min(max(min(fastest_batch(b, *at_once), held), full, ranks), most)

        return between(fastest, self.noise_scale)

    def _stops(self, batch: Callable[[int], int], noise_scale: Estimate, limit: int) -> StopsPaying:
        """Where the noise scale is larger, more ranks pay: so its ends are the ends of this."""

        def seconds(ranks: int, b: float) -> float:
            return self._seconds(ranks, batch(ranks), b)

        def stops(b: float) -> int | None:
            return _first_that_does_not_pay(lambda ranks: seconds(ranks, b), limit)

        point, low, high = stops(noise_scale.value), stops(noise_scale.low), stops(noise_scale.high)
        at = point or limit
        cost = between(lambda b: at * seconds(at, b) / seconds(1, b), noise_scale)
        return StopsPaying(point, low, high, limit, cost)


def _first_that_does_not_pay(seconds: Callable[[int], float], limit: int) -> int | None:
    ranks = 1
    while 2 * ranks <= limit:
        if seconds(ranks) < PAYS * seconds(2 * ranks):
            return ranks
        ranks *= 2
    return None


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(factor * estimate.value, factor * estimate.low, factor * estimate.high)


def _power_of_two(at_most: int) -> int:
    return 1 << (at_most.bit_length() - 1)
