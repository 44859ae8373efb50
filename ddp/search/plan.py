"""Which trials a search still needs, from those that have finished: nothing here remembers, so nothing is lost.

Batch sizes come from the largest down: a large one is sure to get there, and what it needs bounds what a smaller one
may take, which at a bad learning rate never would. Learning rates lie on a grid of factors sqrt 2, numbered from the
job's own. At each batch size: three that are a factor 2 apart, with one seed, around the best that is known nearby;
more of them while the best is at an end; those half way beside the best; all seeds for every one within a factor 2 of
the best that can still matter. What the finished trials say decides what comes next, until nothing more is wanted,
for every target. Only the first seed is raced against what is known: a learning rate that took part in the choice has
all its seeds run out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ddp.search.request import Trial
from ddp.search.store import TrialResult
from ddp.search.sweep_file import Sweep

COARSE = 2  # grid points in a factor 2
FARTHEST = 24  # grid points from the job's learning rate: a factor of 4,096
HOPELESS = 2.0  # times the steps of the best known learning rate at the same batch size
HOPELESS_ELSEWHERE = 4.0  # times what the best at another batch size allows, see `_allowed_by_others`
HOPELESS_SEED = 4.0  # times the steps of the first seed
NEAR = 2.0  # a learning rate that took more than so many times the best's steps needs no more seeds

Runs = Mapping[int, Sequence[TrialResult]]  # those of one batch size, by grid index


@dataclass(frozen=True, slots=True)
class Grid:
    """Learning rates by number; number 0 is the job's."""

    base: float

    def rate(self, index: int) -> float:
        return self.base * 2.0 ** (index / 2)

    def index(self, rate: float) -> int:
        return round(2 * math.log2(rate / self.base))


def wanted(sweep: Sweep, targets: Sequence[float], done: Iterable[TrialResult]) -> list[Trial]:
    """The trials that are needed next, most urgent first; empty when the search is complete.

    `done` may hold failed trials: they count as the worst there is. Trials under way are wanted too.
    """
    trials = [trial for trial in done if trial.method == "sweep"]
    if sweep.section.learning_rates != "auto":
        requests = [
            (seed, size, index)
            for seed in range(sweep.section.seeds)
            for size in reversed(
                sweep.section.batch_sizes
            )  # the large ones are sure to get there, and say how far it is
            for index in range(len(sweep.section.learning_rates))
        ]
        return _without_done(sweep, targets, requests, trials)
    grid = Grid(sweep.job.optimizer.learning_rate)
    runs = {size: _by_index(grid, trials, size) for size in sweep.section.batch_sizes}
    first, more = [], []
    for size in reversed(sweep.section.batch_sizes):
        if _is_out_of_reach(runs[size]):
            continue
        if not runs[size]:
            centre = _guess(sweep, runs, size, len(targets))
            first += [(0, size, centre + step) for step in (0, COARSE, -COARSE)]
            continue
        for target in range(len(targets)):
            for seed, index in _around_the_best(runs[size], target, sweep.section.seeds):
                (more if seed else first).append((seed, size, index))
    return _without_done(sweep, targets, [*first, *more], trials)


def _around_the_best(runs: Runs, target: int, seeds: int) -> list[tuple[int, int]]:
    """(seed, index) that one target asks for at one batch size."""
    best = min(runs, key=lambda index: _cost(runs[index], target, index))
    if abs(best) >= FARTHEST:
        return []
    neighbours = [best - 1, best + 1]
    if not any(index in runs for index in (best - 2, best - 1)) or not any(
        index in runs for index in (best + 1, best + 2)
    ):
        neighbours = [best - COARSE, best + COARSE]
    asked = [(0, index) for index in neighbours]
    if _steps(runs[best], target) is None or any(index not in runs for index in neighbours):
        return asked
    limit = NEAR * (_steps(runs[best], target) or math.inf)
    for index in range(best - COARSE, best + COARSE + 1):
        taken = _steps(runs.get(index, ()), target)
        if taken is not None and taken <= limit:
            asked += [(seed, index) for seed in range(1, seeds)]
    return asked


def _cost(trials: Sequence[TrialResult], target: int, index: int) -> tuple[float, float]:
    """Sorts learning rates, best first: those that reach the target by steps, then by the loss reached, then failures."""
    steps = _steps(trials, target)
    if steps is not None:
        return 0.0, steps
    losses = [trial.curve[-1][1] for trial in trials if trial.curve and not trial.diverged]
    if not losses or not all(map(math.isfinite, losses)):
        return 2.0, float(index)
    return 1.0, sum(losses) / len(losses)


def _steps(trials: Sequence[TrialResult], target: int) -> float | None:
    """Geometric mean over seeds; None unless all of them reached the target."""
    steps = [trial.steps_to_target[target] for trial in trials if target < len(trial.steps_to_target)]
    if not steps or len(steps) < len(trials) or any(math.isnan(each) for each in steps):
        return None
    return math.exp(sum(math.log(max(each, 1e-9)) for each in steps) / len(steps))


def _guess(sweep: Sweep, runs: Mapping[int, Runs], size: int, targets: int) -> int:
    """Where to begin at a batch size: near the best of the nearest one, moved by a root; on the coarse grid."""
    known = {other: best for other in runs if (best := _best_of_all(runs[other], targets)) is not None}
    nearest = min(known, key=lambda other: abs(math.log(size / other)), default=None)
    start, origin = (0, sweep.job_batch_size) if nearest is None else (known[nearest], nearest)
    return COARSE * round((start + math.log2(size / origin)) / COARSE)


def _best_of_all(runs: Runs, targets: int) -> int | None:
    """The best learning rate for the last target, where one reached it."""
    best = min(runs, key=lambda index: _cost(runs[index], targets - 1, index), default=None)
    return best if best is not None and _steps(runs[best], targets - 1) is not None else None


def _is_out_of_reach(runs: Runs) -> bool:
    """Whether this batch size fails whatever the learning rate: memory, most likely."""
    trials = [trial for trials in runs.values() for trial in trials]
    return len(trials) >= 2 and all(trial.stopped_because == "failed" for trial in trials)


def _without_done(
    sweep: Sweep, targets: Sequence[float], requests: Iterable[tuple[int, int, int]], trials: Sequence[TrialResult]
) -> list[Trial]:
    given = sweep.section.learning_rates
    grid = Grid(sweep.job.optimizer.learning_rate)
    done = {(trial.batch_size, trial.learning_rate, trial.seed) for trial in trials}
    result: dict[tuple[int, float, int], Trial] = {}
    for seed, size, index in requests:
        rate = grid.rate(index) if given == "auto" else given[index]
        key = size, rate, seed
        if key in done or key in result:
            continue
        result[key] = Trial(
            method="sweep",
            batch_size=size,
            learning_rate=rate,
            seed=seed,
            targets=tuple(targets),
            maximum_steps=max(1, sweep.section.maximum_examples // size),
            hopeless_steps=hopeless_steps(trials, size, rate, seed),
        )
    return list(result.values())


def hopeless_steps(done: Iterable[TrialResult], size: int, rate: float, seed: int) -> float:
    """Steps after which a run cannot take part in the choice of the learning rate any more; infinite if not known.

    A seed after the first of a learning rate that reached the last target races against that alone, with much room.
    """
    trials = [trial for trial in done if trial.method == "sweep"]
    reached = [trial for trial in trials if trial.steps_to_target and math.isfinite(trial.steps_to_target[-1])]
    if seed:
        own = [trial for trial in trials if (trial.batch_size, trial.learning_rate, trial.seed) == (size, rate, 0)]
        if not own:
            return math.inf
        if own[0] in reached:
            return HOPELESS_SEED * own[0].steps_to_target[-1]
    here = [trial.steps_to_target[-1] for trial in reached if trial.batch_size == size and trial.seed == 0]
    if here:
        return HOPELESS * min(here)
    return HOPELESS_ELSEWHERE * min((_allowed_by_others(trial, size) for trial in reached), default=math.inf)


def _allowed_by_others(trial: TrialResult, size: int) -> float:
    """A smaller batch needs no more examples at its best, a larger one no more steps: steps at `size` at most."""
    return trial.steps_to_target[-1] * max(1.0, trial.batch_size / size)


def _by_index(grid: Grid, trials: Iterable[TrialResult], size: int) -> dict[int, list[TrialResult]]:
    result: dict[int, list[TrialResult]] = {}
    for trial in sorted(trials, key=lambda each: each.seed):
        if trial.batch_size == size:
            result.setdefault(grid.index(trial.learning_rate), []).append(trial)
    return result
