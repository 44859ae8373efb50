"""SIGKILL of any rank at any phase: the survivors say who and when, and under a restarting launcher the run goes on."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import evidence
from faults.running import Ended, Ranks, run
from faults.small_job import START_SECONDS, expect_same_end, write_job
from faults.verdict import Row, UnexpectedError, dealt, expect

END_SECONDS = 30.0
# The phase of the lost rank, as survivors call it; where the kill comes a moment later it may be any.
SAID = {
    "data": ("data",),
    "forward": ("forward",),
    "all_reduce": ("backward", "all-reduce"),  # the averaging of one bucket begins in the middle of backward
    "optimizer": ("optimizer",),
    "save": (),  # it is written while steps go on
    "evaluation": ("evaluation",),
}
ANY = (
    "data",
    "forward",
    "backward",
    "all-reduce",
    "exchange",
    "measure",
    "optimizer",
    "telemetry",
    "save",
    "evaluation",
)
STARTERS = (
    Ranks("launch torchrun", 0, restarts=3),
    Ranks("launch torchrun", 0),
    Ranks("torchrun", 0, restarts=3),
    Ranks("launch mpirun", 0),
)


@dataclass(frozen=True)
class Kill:
    """Who is killed, where, and who had started the ranks."""

    starter: str
    restarts: int
    ranks: int
    rank: int
    phase: str
    step: int
    after_seconds: float


def cases(generator: random.Random, count: int) -> Sequence[Kill]:
    phases = dealt(generator, list(SAID), count)
    starters = itertools.cycle(STARTERS)
    worlds = itertools.cycle((2, 3, 2, 3, 3, 2, 3, 2))  # each with each of the starters
    return [_kill(generator, phase, next(starters), next(worlds)) for phase in phases]


def _kill(generator: random.Random, phase: str, starter: Ranks, ranks: int) -> Kill:
    after = round(generator.uniform(0.0, 0.004), 4) if generator.random() < 0.5 else 0.0
    rank, step = generator.randrange(ranks), generator.randint(2, 20)
    return Kill(starter.starter, starter.restarts, ranks, rank, phase, step, after)


def check(case: Kill, folder: Path) -> tuple[float, str]:
    task = {"action": "kill", "phase": case.phase, "rank": case.rank, "step": case.step}
    write_job(folder, {**task, "after_seconds": case.after_seconds})
    ended = run(Ranks(case.starter, case.ranks, case.restarts), folder, START_SECONDS + END_SECONDS)
    harm = evidence.harm_done(folder, ended)
    said = _named(case, ended)
    if case.restarts:
        expect(ended.code == 0, f"the run did not go on: {ended}")
        expect_same_end(folder, case.ranks)
        return ended.unix_time - harm["time"], f"goes on, same weights; {said}"
    expect(ended.code == 1, f"it did not end with code 1: {ended}")
    seconds = ended.unix_time - harm["time"]
    expect(seconds < END_SECONDS, f"it took {seconds:.1f} s to end: {ended}")
    return seconds, said


def _named(case: Kill, ended: Ended) -> str:
    """What a survivor said of the rank and its phase."""
    phases = (not case.after_seconds and SAID[case.phase]) or ANY
    found = re.search(rf"\brank {case.rank}\b.*\bin ({'|'.join(phases)})\b.*", ended.stderr)
    if found is None:
        raise UnexpectedError(f"no survivor named rank {case.rank} in {' or '.join(phases)}: {ended}")
    return found[0]


ROW = Row(
    "kill",
    "SIGKILL of any rank at any phase",
    "survivors exit within 30 s naming rank and phase; a restarted run ends with the same weights",
    36,
    cases,
    check,
)
