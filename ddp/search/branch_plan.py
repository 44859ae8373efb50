"""Which branches of a run are still needed, from those that have finished: nothing here remembers, as in `plan.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddp.noise.critical_batch import FEWEST_BATCH_SIZES
from ddp.noise.hyperbola import fit_curve
from ddp.search.plan import COARSE, Grid
from ddp.search.request import Trial
from ddp.search.store import TrialResult
from ddp.search.sweep_file import Sweep

MULTIPLES = tuple(2.0**power for power in range(-6, 8))
FIRST_MULTIPLES = 3  # around 1, before it is asked where the bend lies
ABOVE, BELOW = 4.0, 2.0  # batch sizes go on to so many times the bend and down to so small a part of it
EXPONENTS: Mapping[str, tuple[float, ...]] = dict.fromkeys(
    ("sgd", "momentum", "nesterov"), (0.0, 0.5, 1.0)
)  # of k, in the learning rate; others take its root (arXiv:2205.10287)
ROOT = (0.5,)
FARTHEST = 4 * COARSE  # grid points beyond the run's learning rate, at its own batch size: a factor 16
BEYOND_RULE = (
    COARSE  # beyond the rule's elsewhere: further off than a factor 2 a branch trains in another way than the run
)
HOPELESS = 1.4  # times the best known steps at this batch size, for a first seed
HOPELESS_ELSEWHERE = 2.0  # times what the best at another batch size allows
HOPELESS_SEED = 4.0  # times the best known steps at this batch size, for the others

Runs = Mapping[int, Sequence[TrialResult]]  # those of one batch size, by the grid index of their learning rate


@dataclass(frozen=True)
class BranchPlan:
    """Which branches are still needed, from those that have finished.

    Batch sizes begin around the run's own and go out both ways until the bend of the curve lies among them. At each,
    one seed at the learning rates that the rule gives from the best at the run's own, more beside the best until it has
    neighbours or lies far from the rule, then all seeds at the best, which is another where these seeds say so.

    Learning rates lie on the grid of factors sqrt 2 from the run's, as do those that the rule gives for k = 2^j, so that
    none is met under two values. For SGD the rule is k^0, k^(1/2) and k^1: those between them, k^(1/4) and k^(3/4), are
    within 2^(1/4) of grid points that are tried where the best lies beside one of these. Asking for all five from the
    start took 6 % more examples in 45 simulated searches (best rates from k^0 to k^1, bends from 8 to 300), and found
    nothing better.
    """

    origin: str
    batch_size: int
    learning_rate: float
    batch_sizes: tuple[int, ...]
    exponents: tuple[float, ...]
    seeds: int
    maximum_examples: int

    @classmethod
    def of(cls, sweep: Sweep, origin: str, batch_size: int, learning_rate: float, largest: int) -> BranchPlan:
        """Batch sizes at all multiples that are whole, at least 1 and at most `largest`."""
        sizes = [multiple * batch_size for multiple in MULTIPLES]
        return cls(
            origin,
            batch_size,
            learning_rate,
            tuple(int(size) for size in sizes if size.is_integer() and 1 <= size <= largest),
            EXPONENTS.get(sweep.job.optimizer.name, ROOT),
            sweep.section.seeds,
            sweep.section.maximum_examples,
        )

    def pilot(self, steps: int) -> Trial:
        """The run itself, going on for so many steps; its seed is none of the branches', which would take its place."""
        own = self.batch_size, self.learning_rate
        return Trial("branched", *own, self.seeds, (), steps, origin=self.origin, multiple=1.0)

    def is_pilot(self, trial: TrialResult) -> bool:
        return trial.origin == self.origin and not trial.targets

    @property
    def grid(self) -> Grid:
        return Grid(self.learning_rate)

    def rule(self, batch_size: int, own: int = 0) -> list[int]:
        """The grid indices that the rule gives, ascending: k^exponent times `own`, that at the run's batch size."""
        doublings = math.log2(batch_size / self.batch_size)
        return sorted({own + round(COARSE * doublings * exponent) for exponent in self.exponents})

    def wanted(self, targets: tuple[float, ...], done: Iterable[TrialResult]) -> list[Trial]:
        """Most urgent first: first seeds, from the run's own batch size outwards; empty when nothing is missing."""
        mine = [trial for trial in done if trial.origin == self.origin and trial.targets == targets]
        runs: dict[int, dict[int, list[TrialResult]]] = {}
        for trial in mine:
            runs.setdefault(trial.batch_size, {}).setdefault(self.grid.index(trial.learning_rate), []).append(trial)
        own = _best(runs[self.batch_size])[0] if self.batch_size in runs else 0
        chosen = {size: _best(tried) for size, tried in runs.items() if not self._missing_rates(size, tried, own)}
        needed = self._needed({size: steps for size, (_, steps) in chosen.items()})
        requests: list[tuple[int, int, int]] = []
        for size in dict.fromkeys([*needed, *runs]):  # one that was begun is completed
            if size not in chosen:
                requests += [(size, index, 0) for index in self._missing_rates(size, runs.get(size, {}), own)]
            elif math.isfinite(chosen[size][1]):
                best = chosen[size][0]
                present = {trial.seed for trial in runs[size][best]}
                requests += [(size, best, seed) for seed in range(self.seeds) if seed not in present]
        requests.sort(key=lambda request: request[2] > 0)
        return [self._trial(size, self.grid.rate(index), seed, targets, mine) for size, index, seed in requests]

    def _needed(self, steps: Mapping[int, float]) -> list[int]:
        """Batch sizes, nearest first; `steps` at those whose learning rate is chosen, infinite where none arrives."""
        near_first = sorted(self.batch_sizes, key=lambda size: abs(math.log(size / self.batch_size)))
        needed = near_first[:1]
        while more := all(size in steps for size in needed) and (
            near_first[len(needed) : FIRST_MULTIPLES] or self._further({size: steps[size] for size in needed})
        ):
            needed += more
        return needed

    def _further(self, steps: Mapping[int, float]) -> list[int]:
        """The next batch sizes outwards, where the bend does not lie among those there are."""
        known = sorted(size for size in steps if math.isfinite(steps[size]))
        if len(known) < FIRST_MULTIPLES:
            return []
        fit = fit_curve(np.log(known), np.log([steps[size] for size in known]))
        bend = math.exp(fit.log_critical_batch_size)
        larger = [size for size in self.batch_sizes if size > max(steps) == known[-1]][:1]
        smaller = [size for size in self.batch_sizes if size < min(steps) == known[0]][-1:]
        out = larger * (known[-1] < ABOVE * bend) + smaller * (known[0] > bend / BELOW)
        return out or (larger or smaller) * (len(known) < FEWEST_BATCH_SIZES)

    def _missing_rates(self, size: int, runs: Runs, own: int) -> list[int]:
        """Grid indices to try: the rule's, then beside the best until it lies inside or too far from them."""
        rule = self.rule(size, 0 if size == self.batch_size else own)
        if len(runs) < len(rule):  # by count: the rule moves where more seeds move the best of the run's own batch size
            return [index for index in rule if index not in runs]
        best, steps = _best(runs)
        if math.isfinite(steps):
            sides = [index for index in (best - 1, best + 1) if index not in runs]  # a parabola needs one on both sides
        else:  # too high for all, or too low: try on both sides
            sides = [min(runs) - 1, max(runs) + 1]
        far = FARTHEST if size == self.batch_size else BEYOND_RULE
        return [index for index in sides if rule[0] - far <= index <= rule[-1] + far]

    def _trial(
        self, size: int, rate: float, seed: int, targets: tuple[float, ...], mine: Sequence[TrialResult]
    ) -> Trial:
        return Trial(
            method="branched",
            batch_size=size,
            learning_rate=rate,
            seed=seed,
            targets=targets,
            maximum_steps=max(1, self.maximum_examples // size),
            hopeless_steps=_hopeless_steps(mine, size, seed),
            origin=self.origin,
            multiple=size / self.batch_size,
        )


def _mean_steps(trials: Sequence[TrialResult]) -> float:
    """To the last target, geometric mean over seeds; infinite unless all reached it."""
    steps = [trial.steps_to_target[-1] for trial in trials]
    if any(math.isnan(each) or each <= 0 for each in steps):
        return math.inf
    return math.exp(sum(map(math.log, steps)) / len(steps))


def _best(runs: Runs) -> tuple[int, float]:
    """The grid index of the best learning rate of one batch size and its steps to the last target; infinite where none arrives."""
    steps = {index: _mean_steps(trials) for index, trials in runs.items()}
    best = min(steps, key=lambda index: steps[index])
    return best, steps[best]


def _hopeless_steps(done: Sequence[TrialResult], size: int, seed: int) -> float:
    """Steps after which a branch cannot be among the best of its batch size any more.

    From other batch sizes: a smaller one needs no more examples at its best, a larger one no more steps.
    """
    reached = [trial for trial in done if math.isfinite(trial.steps_to_target[-1])]
    here = [trial.steps_to_target[-1] for trial in reached if trial.batch_size == size]
    if here:
        return (HOPELESS_SEED if seed else HOPELESS) * min(here)
    allowed = [trial.steps_to_target[-1] * max(1.0, trial.batch_size / size) for trial in reached]
    return HOPELESS_ELSEWHERE * min(allowed, default=math.inf)
