"""A sweep and branches over the same stretch of training: do they find the same critical batch size, and at what cost?

The sweep's runs went all the way; of their curves only the steps between the branches' first and last loss count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.errors import UsageError
from ddp.noise.critical_batch import CriticalBatch, critical_batch
from ddp.search.curve import steps_to_targets
from ddp.search.findings import FEWEST_BRANCH_STEPS, cells_of
from ddp.search.findings_text import estimate_text
from ddp.search.store import DEFINITION, FILE_NAME, TrialResult, read_fact, read_trials
from ddp.search.sweep_file import Sweep


@dataclass(frozen=True, slots=True)
class SegmentComparison:
    """A sweep's runs and branched ones between the same two losses.

    Attributes:
        start_loss, end_loss: training losses on the fixed subset; the first is the checkpoint's.
        sweep, branched: the fits of each.
        sweep_examples, branched_examples: what all runs of each took, over their whole length.
    """

    start_loss: float
    end_loss: float
    sweep: CriticalBatch
    branched: CriticalBatch
    sweep_examples: int
    branched_examples: int

    @property
    def ratio(self) -> float:
        """Branched over sweep; NaN where one of them has no value."""
        ours, theirs = self.branched.critical_batch_size, self.sweep.critical_batch_size
        return ours.value / theirs.value if ours and theirs else math.nan

    @property
    def share(self) -> float:
        """Of the sweep's examples."""
        return self.branched_examples / self.sweep_examples if self.sweep_examples else math.nan

    def in_words(self) -> str:
        """Both values, their ratio and what each took, in two sentences."""
        ratio = "" if math.isnan(self.ratio) else f", {self.ratio:.2g} times that"
        return (
            f"From training loss {self.start_loss:.4g} to {self.end_loss:.4g} the sweep's runs give {_text(self.sweep)}, "
            f"the branches {_text(self.branched)}{ratio}. The branches took {self.branched_examples:,} examples, "
            f"{100 * self.share:.0f} % of the sweep's {self.sweep_examples:,}."
        )


def compare_on_segment(
    sweep: Sequence[TrialResult], branched: Sequence[TrialResult], end_loss: float | None = None
) -> SegmentComparison:
    """Fit both to the steps between the checkpoint's loss and `end_loss` (the branches' last target), from the curves.

    Args:
        sweep: trials of whole runs; those of other methods are left out, but pilots count among the examples.
        branched: trials from one checkpoint; may come from the same list.

    Raises:
        UsageError: there are no branches.
    """
    whole = [trial for trial in sweep if trial.method == "sweep" and trial.stopped_because != "failed"]
    branches = [
        each for each in branched if each.method == "branched" and each.targets and each.stopped_because != "failed"
    ]
    if not branches:
        raise UsageError("no branched trials to compare: run `ddp critical-batch --method branched --from CHECKPOINT`")
    start = next(trial.curve[0][1] for trial in branches if trial.curve)
    end = branches[0].targets[-1] if end_loss is None else end_loss
    return SegmentComparison(
        start_loss=start,
        end_loss=end,
        sweep=_fit(whole, start, end),
        branched=_fit(branches, start, end),
        sweep_examples=_examples([trial for trial in sweep if trial.method != "branched"]),
        branched_examples=_examples([trial for trial in branched if trial.method == "branched"]),
    )


def _fit(trials: Sequence[TrialResult], start: float, end: float) -> CriticalBatch:
    cells = cells_of(trials, [steps_between(trial, start, end) for trial in trials])
    is_sweep = any(trial.method != "branched" for trial in trials)
    return critical_batch(cells, need_interior=is_sweep, fewest_steps=FEWEST_BRANCH_STEPS)


def steps_between(trial: TrialResult, start_loss: float, end_loss: float) -> float:
    """Steps of a run from one training loss to a lower one, by its curve; NaN where it did not get there."""
    finite = [(step, loss) for step, loss in trial.curve if math.isfinite(loss) and loss > 0]
    first, last = steps_to_targets(finite, (start_loss, end_loss))
    return last - first


def _examples(trials: Iterable[TrialResult]) -> int:
    return sum(trial.steps * trial.batch_size for trial in trials)


def comparisons(trials: Iterable[TrialResult]) -> list[SegmentComparison]:
    """One for each optimizer and checkpoint that has branches, where there is a sweep with that optimizer."""
    trials = list(trials)
    origins = dict.fromkeys((trial.optimizer, trial.origin) for trial in trials if trial.method == "branched")
    found: list[SegmentComparison] = []
    for optimizer, origin in origins:
        whole = [trial for trial in trials if trial.optimizer == optimizer and trial.method != "branched"]
        branches = [trial for trial in trials if (trial.optimizer, trial.origin) == (optimizer, origin)]
        if any(trial.method == "sweep" for trial in whole) and any(trial.targets for trial in branches):
            found.append(compare_on_segment(whole, branches))
    return found


def check_comparable(sweep: Sweep, against: Path) -> None:
    """Check that the directory `against` holds a sweep whose losses are those of `sweep`.

    Raises:
        UsageError: there is none, or it is of another task, optimizer or subset of the training set.
    """
    path = against / FILE_NAME
    if not any(trial.method == "sweep" for trial in read_trials(path)):
        raise UsageError(f"{path}: no sweep to compare with")
    if _losses_are_of(sweep.definition()) != _losses_are_of(read_fact(path, DEFINITION) or {}):
        raise UsageError(
            f"{path}: a sweep of another task, optimizer or sweep.subset_examples: its steps are not comparable"
        )


def _losses_are_of(definition: Mapping[str, Any]) -> tuple[Any, ...]:
    optimizer = definition.get("optimizer", {}).get("name")
    return definition.get("task"), definition.get("seed"), optimizer, definition.get("sweep", {}).get("subset_examples")


def compare_in(directory: Path, against: Path | None = None) -> list[SegmentComparison]:
    """`comparisons` of the branches in `directory` with the sweep there, or with that in `against`."""
    branches = [trial for trial in read_trials(directory / FILE_NAME) if trial.method == "branched"]
    whole = [trial for trial in read_trials((against or directory) / FILE_NAME) if trial.method != "branched"]
    return comparisons([*whole, *branches])


def _text(fit: CriticalBatch) -> str:
    value = fit.critical_batch_size
    return f"no critical batch size ({fit.reason})" if value is None else estimate_text(value)
