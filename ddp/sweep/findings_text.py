"""A sweep's findings in words and aligned columns, for a terminal; and what a trial is called in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddp.sweep.dimensions import shown
from ddp.sweep.findings import ONE_FOLD, Findings
from ddp.sweep.sweep_file import Sweep
from ddp.sweep.trials import Trial
from ddp.telemetry.progress import duration_text

SHOWN_TRIALS = 10


def trial_line(trial: Trial, sweep: Sweep) -> str:
    """For example: coarse/trial-0003  learning_rate 0.01  accuracy 0.97  1.4 s"""
    values = [f"{short_key(key)} {shown(value)}" for key, value in trial.values.items()]
    words = [f"{trial.stage}/{trial.name}", *values]
    if (result := trial.result) is not None:
        if math.isfinite(result.value):
            words.append(f"{sweep.job.evaluation.metric} {result.value:.4g}")
        if result.state != "complete":
            words.append(f"{result.state}: {result.cause}")
        if math.isfinite(result.seconds):
            words.append(duration_text(result.seconds) if result.seconds >= 60 else f"{result.seconds:.1f} s")
    return "  ".join(words)


def short_key(key: str) -> str:
    """The last part: a table has no room for more."""
    return key.rpartition(".")[2]


def headings(found: Findings) -> list[str]:
    """Of `cells`."""
    keys = [each.key for each in found.sweep.dimensions]
    named = [short_key(key) for key in keys]
    columns = [key if named.count(short) > 1 else short for key, short in zip(keys, named, strict=True)]
    return ["rank", "trial", found.metric, "training", "MiB", "seconds", *columns, "ended"]


def cells(found: Findings, trial: Trial, place: int) -> list[str]:
    result = trial.result
    assert result is not None
    values = [shown(trial.values[each.key]) if each.key in trial.values else "–" for each in found.sweep.dimensions]
    return [
        str(place) if trial.is_complete else "–",
        f"{trial.stage}/{trial.name.removeprefix('trial-')}",
        number(result.value, ".4g"),
        number(result.training_value, ".4g"),
        f"{result.peak_memory_bytes / 2**20:,.0f}" if result.peak_memory_bytes else "–",
        number(result.seconds, ".3g"),
        *values,
        "" if result.state == "complete" else result.state,
    ]


def in_words(found: Findings) -> str:
    """What is printed at the end."""
    if found.best is None:
        return "\n".join(["No trial came to its end.", *found.warnings])
    rows = [cells(found, trial, place) for place, trial in enumerate(found.compared[:SHOWN_TRIALS], 1)]
    lines = aligned([headings(found), *rows])
    if len(found.compared) > SHOWN_TRIALS:
        lines.append(f"and {len(found.compared) - SHOWN_TRIALS} more, in results.json")
    best = found.best
    lines += ["", f"best          {best.stage}/{best.name}: {' '.join(found.overrides(best))}"]
    if importance := found.stage_of(best).importance:
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in importance.items())
        lines.append(f"importance    {shares} (PED-ANOVA, stage {best.stage})")
    lines += [f"warning       {warning}" for warning in found.warnings]
    return "\n".join([*lines, f"validation    {ONE_FOLD}"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_left = [column[-1] != "" and not _is_numeric(column[1:]) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, to_left, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_numeric(column: Sequence[str]) -> bool:
    return all(not cell or cell == "–" or (cell[0] in "-0123456789" and "/" not in cell) for cell in column)


def number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"
