"""A run that is killed at random, as a machine's faults would: what it did with its time, and which examples it took.

Each rank logs every optimizer step with the numbers of its examples. A step that was lost with a kill is taken again
by a later attempt, so of each step the last line counts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.running import Ranks, Running, started
from faults.small_job import START_SECONDS, write_job
from faults.verdict import UnexpectedError, expect

EXAMPLES, BATCH = 89, 24
STEPS_PER_EPOCH = 4
RESTARTS = 1000


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as a rank logged it."""

    attempt: int
    step: int
    unix_time: float
    examples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Life:
    """What a run under kills did with its time.

    Attributes:
        kills: how many ranks were killed.
        wall_seconds: from the command to its end.
        up_seconds: mean time from an attempt's first step to the kill that ended it.
        start_seconds: from the command to the first step.
        restart_seconds: mean time from a kill to the first step of the next attempt.
        step_seconds: median between two steps of one attempt.
        lost_steps: mean number of steps that a kill made to be taken again.
        steps: that count.
    """

    kills: int
    wall_seconds: float
    up_seconds: float
    start_seconds: float
    restart_seconds: float
    step_seconds: float
    lost_steps: float
    steps: int

    @property
    def ratio(self) -> float:
        """Time in steps that count, as a share of all time."""
        return self.steps * self.step_seconds / self.wall_seconds


def live(
    folder: Path, ranks: int, *, epochs: int, step_seconds: float, every_steps: int, mean_seconds: float, seed: int
) -> Life:
    """Run to the end, killing a random rank after exponential times with this mean, counted from where it is up again.

    Raises:
        UnexpectedError: it did not come to its end, or an example was not used exactly once in an epoch.
    """
    folder.mkdir(parents=True)
    task = {"step_seconds": step_seconds, "log_examples": True, "examples": EXAMPLES}
    settings = {"run__epochs": epochs, "evaluation__every_steps": 10 * every_steps}
    write_job(folder, task, checkpoint__every_steps=every_steps, checkpoint__keep_best=0, **settings)
    generator, kills = random.Random(seed), list[float]()
    began = time.time()
    with started(Ranks("torchrun", ranks, restarts=RESTARTS), folder) as running:
        while _is_up(folder, running, ranks, since=kills[-1] if kills else 0.0):
            if not _wait(running, generator.expovariate(1 / mean_seconds)):
                break
            kills.append(time.time())
            _kill(folder, generator.randrange(ranks))
        ended = running.wait(START_SECONDS)
    expect(ended.code == 0, f"the run did not come to its end: {ended}")
    logs = [read_log(folder / f"examples-{rank}") for rank in range(ranks)]
    expect_each_once(logs, epochs)
    return _life(logs[0], kills, began, ended.unix_time)


def read_log(path: Path) -> list[Step]:
    """The steps of a rank, in the order in which it took them."""
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return [Step(attempt, step, moment, tuple(seen)) for attempt, step, moment, seen in map(json.loads, lines)]


def expect_each_once(logs: Sequence[Sequence[Step]], epochs: int) -> None:
    """Of all ranks' steps that count, each example is in one, in every epoch.

    Raises:
        UnexpectedError: not so; says in which epoch, and how many are missing or taken twice.
    """
    counting: list[Mapping[int, Step]] = [{each.step: each for each in log} for log in logs]
    for epoch in range(epochs):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        used = Counter(example for last in counting for step in steps for example in _taken(last, step))
        missing = EXAMPLES - len(used)
        twice = sum(count > 1 for count in used.values())
        expect(not missing and not twice, f"epoch {epoch}: {missing} examples were missed, {twice} used again")


def _taken(last: Mapping[int, Step], step: int) -> tuple[int, ...]:
    if step not in last:
        raise UnexpectedError(f"a rank never took step {step}")
    return last[step].examples


def _is_up(folder: Path, running: Running, ranks: int, since: float) -> bool:
    """Wait until every rank has taken a step after `since`; false where the run has come to its end meanwhile."""

    def is_up() -> bool:
        logs = [read_log(folder / f"examples-{rank}")[-1:] for rank in range(ranks)]
        return running.process.poll() is not None or all(log and log[0].unix_time > since + 0.5 for log in logs)

    running.wait_for(is_up, START_SECONDS, "the next attempt")
    return running.process.poll() is None


def _wait(running: Running, seconds: float) -> bool:
    """Whether it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return running.process.poll() is None


def _kill(folder: Path, rank: int) -> None:
    process_id = int((folder / f"rank-{rank}.pid").read_text())
    with contextlib.suppress(ProcessLookupError):  # the run has come to its end just now
        os.kill(process_id, signal.SIGKILL)


def _life(log: Sequence[Step], kills: Sequence[float], began: float, ended: float) -> Life:
    """From rank 0's log."""
    up: list[float] = []
    restarts: list[float] = []
    lost: list[int] = []
    for kill in kills:
        before = [each for each in log if each.unix_time <= kill]
        after = next((each for each in log if each.unix_time > kill and each.attempt != before[-1].attempt), None)
        if after is None:  # killed after its last step
            continue
        first = next(each for each in before if each.attempt == before[-1].attempt)
        up.append(kill - first.unix_time)
        restarts.append(after.unix_time - kill)
        lost.append(before[-1].step - after.step + 1)
    gaps = [new.unix_time - old.unix_time for old, new in itertools.pairwise(log) if old.attempt == new.attempt]
    return Life(
        kills=len(restarts),
        wall_seconds=ended - began,
        up_seconds=statistics.fmean(up or [ended - began]),
        start_seconds=log[0].unix_time - began,
        restart_seconds=statistics.fmean(restarts or [0.0]),
        step_seconds=statistics.median(gaps),
        lost_steps=statistics.fmean(lost or [0]),
        steps=log[-1].step,
    )


def expected_ratio(
    mean_seconds: float, *, restart_seconds: float, interval_seconds: float, stall_seconds: float
) -> float:
    """The share of time in steps that count, of a run without end.

    Up times are exponential with the mean `mean_seconds`; each is followed by a restart and keeps only whole intervals
    between saves: E[floor(X / i)] = 1 / (exp(i / m) - 1) of them.
    """
    whole = 1 / math.expm1((interval_seconds + stall_seconds) / mean_seconds)
    return whole * interval_seconds / (mean_seconds + restart_seconds)
