"""Targets that nobody gave: losses that the largest batch reaches, at its best learning rate, in a known number of steps.

A target that takes a handful of steps says nothing, since the first steps are unlike the rest. At the largest batch
the steps are nearly S_min; with a margin for what it is above that, the targets have S_min of 30 and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ddp.errors import UsageError
from ddp.search.curve import HALF_WIDTH, SPACING, loss_after
from ddp.search.plan import COARSE, FARTHEST, Grid
from ddp.search.request import Trial
from ddp.search.store import TrialResult
from ddp.search.sweep_file import Sweep

TARGET_STEPS = (38, 48, 64)  # of the largest batch
PILOT_STEPS = math.ceil(TARGET_STEPS[-1] * math.exp(HALF_WIDTH) * SPACING) + 2  # smoothing looks ahead
DIGITS = 3  # of a target


def wanted_pilots(sweep: Sweep, done: Iterable[TrialResult]) -> list[Trial]:
    """Pilot runs that are still needed: one seed at the largest batch, until the best learning rate is inside.

    To a factor sqrt 2, as the search itself: a better learning rate found later would take fewer steps to the targets.
    """
    runs = _pilots(sweep, done)
    if not runs:
        return [_trial(sweep, index) for index in (0, COARSE, -COARSE)]
    best = min(runs, key=lambda index: _cost(runs[index], index))
    if abs(best) >= FARTHEST:
        return []
    coarse = {best - COARSE, best + COARSE} - runs.keys()
    fine = {best - 1, best + 1} - runs.keys()
    enclosed = any(best - COARSE <= index < best for index in runs) and any(
        best < index <= best + COARSE for index in runs
    )
    return [_trial(sweep, index) for index in sorted(fine if enclosed else coarse, key=abs)]


def choose_targets(sweep: Sweep, done: Iterable[TrialResult]) -> tuple[float, ...]:
    """Losses on the lower envelope of the pilot curves at TARGET_STEPS, falling, rounded to three digits.

    Raises:
        UsageError: no pilot run came that far without diverging.
    """
    curves = [trial.curve for trial in _pilots(sweep, done).values() if not trial.diverged and trial.curve]
    losses = [[loss_after(curve, steps) for curve in curves] for steps in TARGET_STEPS]
    envelope = [min((loss for loss in each if math.isfinite(loss)), default=math.nan) for each in losses]
    targets = sorted({float(f"{loss:.{DIGITS}g}") for loss in envelope if math.isfinite(loss)}, reverse=True)
    if not targets:
        raise UsageError(
            f"no run of {PILOT_STEPS} steps at {sweep.section.batch_sizes[-1]} examples a step trained: "
            "set optimizer.learning_rate nearer to one that does, or give sweep.targets"
        )
    return tuple(targets)


def _pilots(sweep: Sweep, done: Iterable[TrialResult]) -> dict[int, TrialResult]:
    grid = Grid(sweep.job.optimizer.learning_rate)
    return {grid.index(trial.learning_rate): trial for trial in done if trial.method == "pilot"}


def _cost(trial: TrialResult, index: int) -> tuple[int, float]:
    """Sorts learning rates by the mean log loss at the targets' steps; what diverged or failed comes last, lowest first."""
    losses: Sequence[float] = [loss_after(trial.curve, steps) for steps in TARGET_STEPS]
    if trial.diverged or not all(loss > 0 for loss in losses):  # NaN where the curve is too short
        return 1, float(index)
    return 0, sum(map(math.log, losses))


def _trial(sweep: Sweep, index: int) -> Trial:
    return Trial(
        method="pilot",
        batch_size=sweep.section.batch_sizes[-1],
        learning_rate=Grid(sweep.job.optimizer.learning_rate).rate(index),
        seed=0,
        targets=(),
        maximum_steps=PILOT_STEPS,
    )
