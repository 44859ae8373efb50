"""What a save costs the steps: how much longer the steps after it take, until they are as before.

Steps are timed by the moments in the run's record. A save may hold up the next step, and what it writes on other threads
the ones after that: so the whole interval from one save to the next is compared with as many times the median
of steps in its second half.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.job import parse_job
from faults import evidence
from faults.running import Ranks, run
from faults.verdict import expect

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    """A model and its steps; batches in examples, over all ranks."""

    name: str
    inputs: int
    width: int
    outputs: int
    hidden: int
    batch: int
    every_steps: int
    saves: int


# Saved about as often as pays where something fails every ten minutes: sqrt(2 x cost x time between failures), Young 1974.
TINY = Size("MLP of 5,000 parameters", 32, 48, 10, 1, 32, 2000, 6)
LARGE = Size("MLP of 25 M parameters", 1024, 2048, 1000, 5, 32, 200, 3)


@dataclass(frozen=True, slots=True)
class Stall:
    """Medians over the saves of a run: the first step after one, and the whole interval."""

    step_seconds: float
    first_seconds: float  # that the first step after a save takes longer
    interval_seconds: float  # that all steps of the interval take longer
    every_steps: int

    @property
    def share(self) -> float:
        """Of the time of all steps in the interval."""
        return self.interval_seconds / (self.every_steps * self.step_seconds)


def measure(folder: Path, size: Size, ranks: int) -> Stall:
    """One run with `size.saves` saves on the way."""
    folder.mkdir(parents=True)
    options = {name: getattr(size, name) for name in ("inputs", "width", "outputs", "hidden")}
    table: dict[str, dict[str, Any]] = {
        "run": {"id": "run", "device": "cpu", "threads_per_rank": 1, "steps": size.every_steps * (size.saves + 1)},
        "task": {"name": "wide_task:Task", "options": {**options, "examples": 8 * size.batch}},
        "batch": {"global_batch_size": size.batch, "micro_batch_size": size.batch},
        "optimizer": {"name": "adamw", "learning_rate": 1e-4},
        "metrics": {"enabled": False},
        "noise_scale": {"enabled": False},
        "evaluation": {"metric": "accuracy", "every_steps": 1_000_000},
        "checkpoint": {"every_steps": size.every_steps, "keep": 1, "keep_best": 0},
    }
    (folder / "job.toml").write_text(parse_job(table).to_toml())
    shutil.copy(Path(__file__).with_name("wide_task.py"), folder)
    ended = run(Ranks("launch torchrun", ranks, module="wide_task"), folder, TIMEOUT_SECONDS)
    expect(ended.code == 0, f"the run failed: {ended}")
    with contextlib.closing(sqlite3.connect(folder / evidence.RUN / "run.db")) as database:
        moments = [moment for (moment,) in database.execute("SELECT unix_time FROM steps ORDER BY step")]
    return of_moments(moments, size.every_steps)


def of_moments(moments: Sequence[float], every_steps: int) -> Stall:
    """From the times at which steps 1, 2, ... ended, with a save after each `every_steps` of them but the last."""
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    intervals = [
        gaps[save - 1 : save - 1 + every_steps]
        for save in range(every_steps, len(moments) - every_steps + 1, every_steps)
    ]
    usual = [statistics.median(interval[every_steps // 2 :]) for interval in intervals]
    return Stall(
        step_seconds=statistics.median(usual),
        first_seconds=statistics.median(interval[0] - step for interval, step in zip(intervals, usual, strict=True)),
        interval_seconds=statistics.median(
            sum(interval) - statistics.fmean(interval[every_steps // 2 :]) * len(interval) for interval in intervals
        ),
        every_steps=every_steps,
    )
