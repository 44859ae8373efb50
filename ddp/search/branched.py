"""The critical batch size from branches of one run: cheaper than a sweep, since only a stretch of training is run.

From a checkpoint, runs go on at k times its batch size until a lower loss is reached, each with learning rates that a
rule gives for k; the hyperbola is then fitted over k as in a sweep. What it measures is the critical batch size of
this stretch: where the noise scale grows while training it is another than that of the whole way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ddp.errors import UsageError
from ddp.search.critical_batch import TARGETS, SearchLoop, alone_in, begin_or_go_on, refuse_to_mix, write_results
from ddp.search.curve import loss_after
from ddp.search.progress import SearchProgress
from ddp.search.request import Trial
from ddp.search.store import FILE_NAME, TrialResult, read_fact, read_trials, write_fact
from ddp.search.sweep_file import Sweep
from ddp.search.workers import Pool
from ddp.training.signals import stop_on_signals

MULTIPLES = tuple(2.0**power for power in range(-2, 5))
EXPONENTS = {"sgd": (0.0, 0.25, 0.5, 0.75, 1.0)}  # of k, in the learning rate; others take its root (arXiv:2205.10287)
ROOT = (0.5,)
NEIGHBOUR = math.sqrt(2)  # from the best to the next learning rate on either side, at most
FARTHEST = 16.0  # beyond the rule's learning rates
ALIKE = 1.3  # learning rates that take at most so many times the best's steps get all seeds: others cannot matter
HOPELESS = 1.5  # times the best known steps at this batch size, for a first seed
HOPELESS_SEED = 4.0  # for the others
PILOT_STEPS = 120  # at the run's own batch size and learning rate, where no target is given
DIGITS = 3


def search_branches(
    sweep: Sweep,
    checkpoint: Path,
    *,
    resume: bool = False,
    workers: int | None = None,
    allow_import: bool = False,
    stream: TextIO | None = None,
) -> Path:
    """Run branches from `checkpoint` and write the results beside the sweep's; returns the sweep's directory.

    Targets are those of the sweep file that lie below the checkpoint's loss; with "auto" those of a sweep in the
    directory; without one the loss that the run itself would have some 100 steps later.

    Raises:
        UsageError: no target lies below the checkpoint's loss; the checkpoint is of another task or optimizer; or as
            for a sweep.
        CheckpointError: the checkpoint cannot be read.
        StoppedError: a signal asked for it; what has finished is kept.
    """
    from ddp.search.branch_point import read_branch_point

    point = read_branch_point(checkpoint, sweep)
    directory, path = sweep.directory, sweep.directory / FILE_NAME
    with alone_in(directory):
        begun = any(trial.origin == point.origin for trial in read_trials(path))
        refuse_to_mix(path, sweep, resume=resume, begun=begun)
        with (
            Pool(sweep, workers or sweep.section.workers, allow_import=allow_import) as pool,
            stop_on_signals() as stop,
            SearchProgress(stream) as progress,
        ):
            begin_or_go_on(path, sweep)
            largest = min(sweep.section.maximum_examples, pool.ready.training_examples // 2)
            plan = BranchPlan.of(sweep, point.origin, point.batch_size, point.learning_rate, largest)
            loop = SearchLoop(pool, path, stop, progress, read_trials(path), sweep.job.optimizer.name)
            targets = _targets(loop, sweep, path, plan)
            expected = len(plan.batch_sizes) * (len(plan.exponents) + 2 + 3 * (sweep.section.seeds - 1))
            loop.complete(lambda done: plan.wanted(targets, done), f"branches to {targets[-1]:g}", expected)
        write_results(directory)
    return directory


def _targets(loop: SearchLoop, sweep: Sweep, path: Path, plan: BranchPlan) -> tuple[float, ...]:
    """Losses below the checkpoint's; see `search_branches`."""
    fact = f"targets from {plan.origin}"
    if chosen := read_fact(path, fact):
        return tuple(chosen)
    given = read_fact(path, TARGETS) if sweep.section.targets == "auto" else sweep.section.targets
    pilot = plan.pilot(1 if given else PILOT_STEPS)
    loop.complete(lambda done: [] if any(map(plan.is_pilot, done)) else [pilot], "a look at the checkpoint", 1)
    curve = next(trial.curve for trial in loop.done if plan.is_pilot(trial))
    if not curve:
        raise UsageError(f"{plan.origin}: cannot be gone on from: {loop.done[-1].cause}")
    start = curve[0][1]
    losses = given or [float(f"{loss_after(curve, PILOT_STEPS / 1.13):.{DIGITS}g}")]
    targets = tuple(loss for loss in losses if loss < start)
    if not targets:
        raise UsageError(
            f"{plan.origin}: its training loss of {start:.4g} is at or below every target "
            f"({', '.join(f'{loss:g}' for loss in losses)}): give lower sweep.targets or an earlier checkpoint"
        )
    write_fact(path, fact, targets)
    return targets


@dataclass(frozen=True)
class BranchPlan:
    """Which branches are still needed, from those that have finished.

    At each batch size: one seed at each learning rate of the rule, more beside the best until it has neighbours, then
    all seeds where steps are like the best's.
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
        """The run itself, going on for so many steps."""
        return Trial("branched", self.batch_size, self.learning_rate, 0, (), steps, origin=self.origin, multiple=1.0)

    def is_pilot(self, trial: TrialResult) -> bool:
        return trial.origin == self.origin and not trial.targets

    def rates(self, batch_size: int) -> list[float]:
        """The rule's learning rates, ascending: k^exponent times the run's."""
        k = batch_size / self.batch_size
        return sorted({_rounded(self.learning_rate * k**exponent) for exponent in self.exponents})

    def wanted(self, targets: tuple[float, ...], done: Iterable[TrialResult]) -> list[Trial]:
        """Most urgent first: the run's own batch size, then those near it; empty when nothing is missing."""
        mine = [trial for trial in done if trial.origin == self.origin and trial.targets == targets]
        near_first = sorted(self.batch_sizes, key=lambda size: abs(math.log(size / self.batch_size)))
        trials: list[Trial] = []
        for size in near_first:
            runs: dict[float, list[TrialResult]] = {}
            for trial in mine:
                if trial.batch_size == size:
                    runs.setdefault(trial.learning_rate, []).append(trial)
            for rate, seed in self._requests(size, runs):
                trials.append(self._trial(size, rate, seed, targets, mine))
        return sorted(trials, key=lambda trial: trial.seed > 0)

    def _requests(self, size: int, runs: dict[float, list[TrialResult]]) -> list[tuple[float, int]]:
        """(learning rate, seed) of what has not been run yet at one batch size."""
        rule = self.rates(size)
        if missing := [rate for rate in rule if rate not in runs]:
            return [(rate, 0) for rate in missing]
        steps = {rate: _mean_steps(trials) for rate, trials in runs.items()}
        best = min(steps, key=lambda rate: steps[rate])
        if not math.isfinite(steps[best]):  # too high for all, or too low: try on both sides
            sides = [min(runs) / NEIGHBOUR, max(runs) * NEIGHBOUR]
        else:
            sides = _missing_neighbours(best, list(runs))
        sides = [
            _rounded(rate) for rate in sides if rule[0] / FARTHEST < 1.01 * rate and rate < 1.01 * FARTHEST * rule[-1]
        ]
        if sides or not math.isfinite(steps[best]):
            return [(rate, 0) for rate in sides]
        return [
            (rate, seed)
            for rate, trials in sorted(runs.items())
            if steps[rate] <= ALIKE * steps[best]
            for seed in range(self.seeds)
            if seed not in {trial.seed for trial in trials}
        ]

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


def _missing_neighbours(best: float, tried: Sequence[float]) -> list[float]:
    """Learning rates beside the best, where none was tried that near: a parabola needs one on both sides."""
    near = [rate / best for rate in tried if 1.01 * rate / best > 1 / NEIGHBOUR and rate / best < 1.01 * NEIGHBOUR]
    below = [] if any(each < 1 for each in near) else [best / NEIGHBOUR]
    return below if any(each > 1 for each in near) else [*below, best * NEIGHBOUR]


def _rounded(rate: float) -> float:
    """One number for one learning rate, however it was come by."""
    return float(f"{rate:.9g}")


def _mean_steps(trials: Sequence[TrialResult]) -> float:
    """To the last target, geometric mean over seeds; infinite unless all reached it."""
    steps = [trial.steps_to_target[-1] for trial in trials]
    if any(math.isnan(each) or each <= 0 for each in steps):
        return math.inf
    return math.exp(sum(map(math.log, steps)) / len(steps))


def _hopeless_steps(done: Sequence[TrialResult], size: int, seed: int) -> float:
    """Steps after which a branch cannot be among the best of its batch size any more.

    From other batch sizes: a smaller one needs no more examples at its best, a larger one no more steps.
    """
    reached = [trial for trial in done if math.isfinite(trial.steps_to_target[-1])]
    here = [trial.steps_to_target[-1] for trial in reached if trial.batch_size == size]
    if here:
        return (HOPELESS_SEED if seed else HOPELESS) * min(here)
    allowed = [trial.steps_to_target[-1] * max(1.0, trial.batch_size / size) for trial in reached]
    return HOPELESS_SEED * min(allowed, default=math.inf)
