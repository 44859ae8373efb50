"""What the trials of a search say: for each optimizer and target the critical batch size, and what lies beside it.

Trials in, plain values out; `result.json` and the report are made from these alone.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ddp.noise.best_rate import Cell, is_same_rate
from ddp.noise.critical_batch import BestRate, CriticalBatch, critical_batch
from ddp.noise.estimate import Estimate
from ddp.noise.harmless_batch import HarmlessBatch, largest_harmless_batch
from ddp.noise.interval import t_quantile
from ddp.search.store import FILE_NAME, TrialMethod, TrialResult, read_trials

RESULT = "result.json"
FEWEST_STEPS = 30.0  # of S_min: a target reached in fewer steps measures the start,
FEWEST_BRANCH_STEPS = 10.0  # which branches have behind them
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One batch size at its best learning rate.

    Attributes:
        best: learning rate and steps.
        examples: to the target: steps times batch size.
        validation_loss, validation_metric: at the target, mean over seeds with a 95 % t-interval: generalisation.
        seconds_per_step: median over runs at the grid's best learning rate.
        peak_memory_bytes: largest of these runs.
        noise_plain, noise_preconditioned: Bbar up to the target, geometric mean over seeds, in examples; NaN where
            it was not measured or not above 0.
    """

    best: BestRate
    examples: Estimate
    validation_loss: Estimate
    validation_metric: Estimate
    seconds_per_step: float
    peak_memory_bytes: int
    noise_plain: float
    noise_preconditioned: float

    @property
    def batch_size(self) -> int:
        return int(self.best.batch_size)

    @property
    def seconds(self) -> float:
        """To the target."""
        return self.best.steps.value * self.seconds_per_step


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one optimizer, method and target.

    Attributes:
        target: training loss.
        origin: the checkpoint that branched runs began at; empty for a sweep.
        fit: B_crit, or the reason why there is none.
        harmless: the largest batch that does no harm.
        predicted_plain, predicted_preconditioned: what the noise scale on the way to the target predicts: the median
            over batch sizes of Bbar, with its smallest and largest; None where it was not measured.
        learning_rates: steps at every learning rate that was tried: (batch size, rate, geometric mean or NaN).
        runs: that took part.
    """

    optimizer: str
    method: TrialMethod
    origin: str
    target: float
    fit: CriticalBatch
    harmless: HarmlessBatch | None
    rows: tuple[BatchRow, ...]
    predicted_plain: Estimate | None
    predicted_preconditioned: Estimate | None
    learning_rates: tuple[tuple[float, float, float], ...]
    runs: int

    @property
    def name(self) -> str:
        """What the value belongs to, in words."""
        return f"{self.optimizer.upper() if self.optimizer == 'sgd' else self.optimizer.capitalize()} to training loss {self.target:g}"


def read_findings(directory: Path) -> list[Finding]:
    """Those of a search's directory; an empty list where no trial has finished.

    Raises:
        UsageError: its database cannot be read.
    """
    return findings(read_trials(directory / FILE_NAME))


def findings(trials: Iterable[TrialResult]) -> list[Finding]:
    """One for each optimizer, method, origin and target, targets from the first reached on; pilot runs have none."""
    chosen = [trial for trial in trials if trial.method != "pilot" and trial.targets]
    chosen.sort(key=_group)
    found: list[Finding] = []
    for _, group in groupby(chosen, key=_group):
        runs = list(group)
        found += [_finding(runs, index) for index in range(len(runs[0].targets))]
    return found


def write_result(directory: Path) -> Path:
    """Write `directory`/result.json, a list with an object for each finding, and return its path."""
    path = directory / RESULT
    entries = [as_json(finding) for finding in read_findings(directory)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def as_json(finding: Finding) -> dict[str, Any]:
    """Plain JSON values: null for what is not known; what a reader looks for first comes first."""
    value = finding.fit.critical_batch_size or UNKNOWN
    head = {
        "method": finding.method,
        "optimizer": finding.optimizer,
        "target": f"loss {finding.target:g}",
        "critical_batch_size": value.value,
        "low": value.low,
        "high": value.high,
    }
    return _finite(
        {**head, "target_loss": finding.target, **{k: v for k, v in asdict(finding).items() if k not in head}}
    )


def _group(trial: TrialResult) -> tuple[str, str, str, tuple[float, ...]]:
    return trial.method, trial.origin, trial.optimizer, tuple(-target for target in trial.targets)


def _finding(trials: Sequence[TrialResult], index: int) -> Finding:
    first = trials[0]
    trials = [trial for trial in trials if trial.stopped_because != "failed"]  # killed, or never begun: says nothing
    cells = cells_of(trials, [trial.steps_to_target[index] for trial in trials])
    fit = fit_of(cells, first.method)
    rows = tuple(_row(best, trials, index) for best in fit.best)
    return Finding(
        optimizer=first.optimizer,
        method=first.method,
        origin=first.origin,
        target=first.targets[index],
        fit=fit,
        harmless=largest_harmless_batch(cells, need_interior=first.method != "branched"),
        rows=rows,
        predicted_plain=_predicted([row.noise_plain for row in rows]),
        predicted_preconditioned=_predicted([row.noise_preconditioned for row in rows]),
        learning_rates=tuple(
            (cell.batch_size, cell.learning_rate, _geometric_mean(cell.steps) if cell.reached else math.nan)
            for cell in cells
        ),
        runs=len(trials),
    )


def fit_of(cells: Iterable[Cell], method: TrialMethod) -> CriticalBatch:
    """Branches have the start behind them, and learning rates that keep to a rule, so that the best may lie at an end."""
    if method == "branched":
        return critical_batch(cells, need_interior=False, fewest_steps=FEWEST_BRANCH_STEPS)
    return critical_batch(cells, fewest_steps=FEWEST_STEPS)


def cells_of(trials: Sequence[TrialResult], steps: Sequence[float]) -> list[Cell]:
    """Trials that differ by their seed alone, with the steps of each (NaN where a trial did not arrive), in order."""
    pairs = sorted(zip(trials, steps, strict=True), key=lambda pair: _cell_key(pair[0]))
    return [
        Cell(size, rate, tuple(steps if steps > 0 else math.nan for _, steps in group))
        for (size, rate), group in groupby(pairs, key=lambda pair: _cell_key(pair[0]))
    ]


def _cell_key(trial: TrialResult) -> tuple[int, float]:
    return trial.batch_size, trial.learning_rate


def _row(best: BestRate, trials: Sequence[TrialResult], index: int) -> BatchRow:
    runs = [
        trial
        for trial in trials
        if trial.batch_size == best.batch_size and is_same_rate(trial.learning_rate, best.grid_learning_rate)
    ]
    steps, size = best.steps, best.batch_size
    return BatchRow(
        best=best,
        examples=Estimate(steps.value * size, steps.low * size, steps.high * size),
        validation_loss=mean_over_seeds([trial.validation_loss_at_target[index] for trial in runs]),
        validation_metric=mean_over_seeds([trial.validation_metric_at_target[index] for trial in runs]),
        seconds_per_step=statistics.median(trial.seconds_per_step for trial in runs),
        peak_memory_bytes=max(trial.peak_memory_bytes for trial in runs),
        noise_plain=_geometric_mean([trial.noise_plain[index] for trial in runs]),
        noise_preconditioned=_geometric_mean([trial.noise_preconditioned[index] for trial in runs]),
    )


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean with its t-interval; infinitely wide from a single value, NaN where one is NaN."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2 or not math.isfinite(mean):
        return Estimate(mean, *((-math.inf, math.inf) if math.isfinite(mean) else (math.nan, math.nan)))
    half = t_quantile(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def _predicted(noise_scales: Sequence[float]) -> Estimate | None:
    known = [value for value in noise_scales if math.isfinite(value)]
    return Estimate(statistics.median(known), min(known), max(known)) if known else None


def _geometric_mean(values: Sequence[float]) -> float:
    """NaN unless all are finite and above 0."""
    if not values or any(not (0 < value < math.inf) for value in values):
        return math.nan
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
