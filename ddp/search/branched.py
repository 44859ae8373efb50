"""The critical batch size from branches of one run: cheaper than a sweep, since only a stretch of training is run.

From a checkpoint, runs go on at k times its batch size until a lower loss is reached, each with learning rates that a
rule gives for k; the hyperbola is then fitted over k as in a sweep. What it measures is the critical batch size of
this stretch: where the noise scale grows while training it is another than that of the whole way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ddp.errors import UsageError
from ddp.noise.critical_batch import FEWEST_BATCH_SIZES
from ddp.search.branch_plan import BranchPlan
from ddp.search.critical_batch import SearchLoop, alone_in, begin_or_go_on, refuse_to_mix, targets_in, write_results
from ddp.search.curve import HALF_WIDTH, SPACING, Curve, loss_after, steps_to_targets
from ddp.search.progress import SearchProgress
from ddp.search.store import FILE_NAME, read_fact, read_trials, write_fact
from ddp.search.sweep_file import Sweep
from ddp.search.workers import Pool
from ddp.training.signals import stop_on_signals

TARGET_STEPS = 100  # of the run itself, to the target where none is given
PILOT_STEPS = math.ceil(TARGET_STEPS * math.exp(HALF_WIDTH) * SPACING) + 2  # smoothing looks ahead
ENOUGH_STEPS = 60.0  # of these to a target: lower ones are left out, S_min being 10 where the bend is at k = 5
DIGITS = 3


def search_branches(
    sweep: Sweep,
    checkpoint: Path,
    *,
    against: Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    allow_import: Sequence[str] = (),
    stream: TextIO | None = None,
) -> Path:
    """Run branches from `checkpoint` and write the results beside the sweep's; returns the sweep's directory.

    Targets are those of the sweep file that lie below the checkpoint's loss; with "auto" those of the sweep in
    `against`, else in the directory; without one the loss that the run itself would have TARGET_STEPS later.

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
            largest = max(pool.ready.training_examples // 2, sweep.section.batch_sizes[-1])
            largest = min(sweep.section.maximum_examples, largest)
            plan = BranchPlan.of(sweep, point.origin, point.batch_size, point.learning_rate, largest)
            loop = SearchLoop(pool, path, stop, progress, read_trials(path), sweep.job.optimizer.name)
            targets = _targets(loop, sweep, path, plan, against or directory)
            expected = FEWEST_BATCH_SIZES * (len(plan.exponents) + 2 + sweep.section.seeds - 1)
            loop.complete(lambda done: plan.wanted(targets, done), f"branches to {targets[-1]:g}", expected)
        write_results(directory)
    return directory


def _targets(loop: SearchLoop, sweep: Sweep, path: Path, plan: BranchPlan, against: Path) -> tuple[float, ...]:
    """Losses below the checkpoint's; see `search_branches`."""
    fact = f"targets from {plan.origin}"
    given = targets_in(against) if sweep.section.targets == "auto" else sweep.section.targets
    if chosen := read_fact(path, fact):
        if given and not set(chosen) <= set(given):
            raise UsageError(
                f"{path}: branches from {plan.origin} were begun to training losses {chosen}, and now they are {given}: "
                "restore that, or give another sweep.directory"
            )
        return tuple(chosen)
    pilot = plan.pilot(PILOT_STEPS)
    loop.complete(lambda done: [] if any(map(plan.is_pilot, done)) else [pilot], "a look at the checkpoint", 1)
    looked = next(trial for trial in loop.done if plan.is_pilot(trial))
    if not looked.curve:
        raise UsageError(f"{plan.origin}: cannot be gone on from: {looked.cause}")
    start = looked.curve[0][1]
    if not math.isfinite(start):
        raise UsageError(f"{plan.origin}: its training loss is {start:g}: give a checkpoint of a run that trains")
    curve = [(step, loss) for step, loss in looked.curve if math.isfinite(loss)]
    losses = given or [_loss_to_reach(curve, plan.origin)]
    targets = tuple(loss for loss in losses if loss < start)
    if not targets:
        raise UsageError(
            f"{plan.origin}: its training loss of {start:.4g} is at or below every target "
            f"({', '.join(f'{loss:g}' for loss in losses)}): give lower sweep.targets or an earlier checkpoint"
        )
    targets = _far_enough(targets, steps_to_targets(curve, targets))
    write_fact(path, fact, targets)
    return targets


def _loss_to_reach(curve: Curve, origin: str) -> float:
    """The target where none is given."""
    loss, start = loss_after(curve, TARGET_STEPS), curve[0][1]
    if math.isnan(loss):
        raise UsageError(
            f"{origin}: the run goes wrong after {curve[-1][0]} more steps at its own learning rate: give an earlier "
            "checkpoint, or sweep.targets"
        )
    rounded = float(f"{loss:.{DIGITS}g}")
    if rounded >= start:
        raise UsageError(
            f"{origin}: its training loss of {start:.4g} is {loss:.4g} after {TARGET_STEPS} more steps: it does not fall "
            "any more; give an earlier checkpoint, or sweep.targets"
        )
    return rounded


def _far_enough(targets: tuple[float, ...], steps: Sequence[float]) -> tuple[float, ...]:
    """Up to the first target that takes the run itself ENOUGH_STEPS; NaN where it takes longer than was looked at."""
    last = next((index for index, each in enumerate(steps) if not each < ENOUGH_STEPS), len(targets) - 1)
    return targets[: last + 1]
