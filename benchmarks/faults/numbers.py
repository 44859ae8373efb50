"""Numbers that go wrong in one rank: NaN and infinity, and parameters that change without anybody having told them to."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.errors import DivergedError
from faults import evidence
from faults.running import Ended, Ranks, run
from faults.small_job import expect_same_end, write_job
from faults.verdict import Row, dealt, expect

ACTIONS = ("nan_loss", "inf_loss", "nan_gradient", "inf_gradient")
CAP = 3
ROLL_BACKS = 1  # a step that goes wrong a second time is passed over, so three times are two steps that go back
INTERVAL = 5


@dataclass(frozen=True)
class NotFinite:
    """What goes wrong in whose step, how many times, and what the job says about it."""

    action: str
    policy: str
    times: int
    ranks: int
    rank: int
    step: int

    @property
    def code(self) -> int:
        """What the run has to end with."""
        return DivergedError.exit_code if self.policy == "stop" or self.times > CAP else 0


def not_finite_cases(generator: random.Random, count: int) -> Sequence[NotFinite]:
    policies = [("skip", 1), ("stop", 1), ("roll_back", 1), ("skip", CAP), ("skip", CAP + 1), ("roll_back", CAP + 1)]
    drawn: list[NotFinite] = []
    dealt_policies = [
        *dealt(generator, policies[:3], 3),
        *dealt(generator, policies[3:], 3),
        *dealt(generator, policies, count),
    ]
    for (policy, times), action in zip(dealt_policies, dealt(generator, ACTIONS, count), strict=False):
        ranks = generator.choice((2, 3))
        # From step 8 on there is a checkpoint to go back to.
        drawn.append(NotFinite(action, policy, times, ranks, generator.randrange(ranks), generator.randint(8, 20)))
    return drawn


def check_not_finite(case: NotFinite, folder: Path) -> tuple[float, str]:
    task = {"action": case.action, "phase": "forward", "rank": case.rank, "step": case.step, "times": case.times}
    faults: dict[str, Any] = {"on_not_finite": case.policy, "max_skipped_steps": CAP, "max_roll_backs": ROLL_BACKS}
    write_job(folder, task, **{f"faults__{name}": value for name, value in faults.items()})
    ended = run(Ranks("warm", case.ranks), folder)
    harm = evidence.harm_done(folder, ended)
    expect(ended.code == case.code, f"it did not end with {case.code}: {ended}")
    said = _says(case, ended)
    if case.code == 0:
        evidence.weights(folder, case.ranks)  # the same on all ranks
        if case.policy == "roll_back":
            expect_same_end(folder, case.ranks)
    elif case.policy == "stop":
        outcome = evidence.outcome_of(folder)
        expect(outcome.step == harm["step"], f"it stopped in step {outcome.step}, not in step {harm['step']}: {ended}")
    return ended.unix_time - harm["time"], said


def _says(case: NotFinite, ended: Ended) -> str:
    """The line that names the rank and, where the run went on, what was done about it."""
    word = {"skip": "passed over", "roll_back": "went back"}[case.policy] if case.code == 0 else "not finite"
    lines = [line for line in ended.stderr.splitlines() if word in line and f"rank {case.rank}" in line]
    expect(lines, f"no line with rank {case.rank} and {word!r}: {ended}")
    return lines[-1]


@dataclass(frozen=True)
class Flip:
    """Which bit of which element of which parameter changes, on which rank, before which update."""

    ranks: int
    rank: int
    step: int
    parameter: int
    element: int
    bit: int


def flip_cases(generator: random.Random, count: int) -> Sequence[Flip]:
    drawn: list[Flip] = []
    for ranks in dealt(generator, (3, 2, 3), count):
        bit = generator.choice((*range(23, 31), 31))  # of the exponent, or the sign
        element, parameter = generator.randrange(1000), generator.randrange(1000)
        drawn.append(Flip(ranks, generator.randrange(ranks), generator.randint(3, 20), parameter, element, bit))
    return drawn


def check_flip(case: Flip, folder: Path) -> tuple[float, str]:
    flip = {"parameter": case.parameter, "element": case.element, "bit": case.bit}
    task = {"action": "flip", "phase": "optimizer", "rank": case.rank, "step": case.step, **flip}
    write_job(folder, task, faults__check_replicas_every_steps=INTERVAL)
    ended = run(Ranks("warm", case.ranks), folder)
    harm, outcome = evidence.harm_done(folder, ended), evidence.outcome_of(folder)
    expect(ended.code in (1, DivergedError.exit_code), f"it did not end with 1: {ended}")
    if ended.code == DivergedError.exit_code:  # the flipped value is so large that its square is infinite
        expect(f"not finite on rank {case.rank} " in outcome.cause, f"rank {case.rank} is not named: {ended}")
    else:
        _expect_named(case, outcome.cause)
        expect(harm["parameter"] in outcome.cause, f"the parameter {harm['parameter']} is not named: {ended}")
    steps = (outcome.step or 0) - harm["step"]
    expect(0 <= steps <= INTERVAL, f"noticed {steps} steps later: {ended}")
    return ended.unix_time - harm["time"], f"{outcome.cause} ({steps} steps later)"


def _expect_named(case: Flip, cause: str) -> None:
    """The rank that has it wrong comes first; of two it may not be told, which is then said."""
    first = re.search(r" is \S+ on rank (\d+) and ", cause)
    expect(first, f"no value is shown for one rank alone: {cause}")
    is_told = "cannot be told" not in cause
    expect(is_told or case.ranks == 2, f"of {case.ranks} ranks the one is not told: {cause}")
    expect(
        not is_told or first is None or first[1] == str(case.rank), f"another rank than {case.rank} is named: {cause}"
    )


NOT_FINITE = Row(
    "not-finite",
    "NaN or infinity in one rank's loss or gradient",
    "same verdict on all ranks in that step: skip with a cap, stop with 3, or roll back",
    24,
    not_finite_cases,
    check_not_finite,
)
FLIP = Row(
    "bit-flip",
    "one rank's parameters silently changed",
    "rank (of two: where its value is implausible) and parameter named within one check interval",
    24,
    flip_cases,
    check_flip,
)
