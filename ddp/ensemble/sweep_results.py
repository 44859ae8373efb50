"""The best runs of a sweep, out of the results.json that it wrote. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from ddp.errors import UsageError


def best_runs(directory: Path, count: int) -> list[Path]:
    """The directories of the `count` best trials, the best first.

    Raises:
        UsageError: it is no sweep's directory, or has not so many trials that were ranked and kept their checkpoints.
    """
    path = directory / "results.json"
    try:
        trials = json.loads(path.read_text(encoding="utf-8"))["trials"]
        ranked = sorted(
            (each["rank"], str(each["stage"]), str(each["trial"])) for each in trials if isinstance(each["rank"], int)
        )
    except OSError as fault:
        raise UsageError(f"--sweep {directory}: cannot read {path.name}: {fault.strerror}") from None
    except (ValueError, KeyError, TypeError) as fault:
        raise UsageError(f"--sweep {directory}: {path.name} is not a sweep's results: {fault!r}") from None
    if len(ranked) < count:
        raise UsageError(f"--best {count}: the sweep has {len(ranked)} ranked trials")
    found = [directory / stage / trial for _, stage, trial in ranked[:count]]
    if missing := [each for each in found if not any((each / "checkpoints").glob("step-*"))]:
        raise UsageError(
            f"--best {count}: the sweep kept no checkpoint of {missing[0]}: a smaller --best, or a sweep with a larger sweep.keep"
        )
    return found
