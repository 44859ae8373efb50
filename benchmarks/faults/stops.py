"""SIGTERM and SIGUSR1 at any time: all ranks agree, a checkpoint is saved, code 75, and the run goes on from there."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.errors import StoppedError
from faults import evidence
from faults.running import Ranks, Running, run, started
from faults.small_job import START_SECONDS, expect_same_end, write_job
from faults.verdict import Row, dealt, expect

STOP_SECONDS = 25.0
SLOW_SECONDS = 0.15  # a step, so that the run is not over before the signal
HOLD_SECONDS = 0.3  # the rank stays in its phase so long, and the signal comes meanwhile
PHASES = ("warm_up", "data", "forward", "all_reduce", "optimizer", "evaluation", "save")
START = "start"  # at any time from when the ranks are there
SIGNALS = {
    "launch torchrun": ("SIGTERM", "SIGUSR1"),
    "launch mpirun": ("SIGTERM", "SIGUSR1"),
    "torchrun": ("SIGTERM",),  # it dies of SIGUSR1
    "mpirun": ("SIGUSR1",),  # after SIGTERM it gives the ranks a quarter of a second
}
CODES = {"torchrun": 1, "mpirun": StoppedError.exit_code}  # torchrun answers 1 for whatever its workers leave with


@dataclass(frozen=True)
class Stop:
    """Which signal comes when, and to whom."""

    starter: str
    number: str
    ranks: int
    workers: int
    phase: str
    step: int
    after_seconds: float


def cases(generator: random.Random, count: int) -> Sequence[Stop]:
    ways = [(starter, number) for starter, numbers in SIGNALS.items() for number in numbers]
    phases = dealt(generator, [*PHASES, START], count)
    return [
        Stop(
            *way,
            ranks=generator.choice((2, 2, 3)),
            workers=(0, 2)[index % 2],
            phase=phase,
            step=generator.randint(2, 20),
            after_seconds=round(generator.uniform(0.0, 4.0 if phase == START else HOLD_SECONDS), 3),
        )
        for index, (way, phase) in enumerate(zip(dealt(generator, ways, count), phases, strict=True))
    ]


def check(case: Stop, folder: Path) -> tuple[float, str]:
    write_job(folder, _task(case), data__workers=case.workers)
    with started(Ranks(case.starter, case.ranks), folder) as running:
        _wait_for_the_moment(case, running, folder)
        time.sleep(case.after_seconds)
        running.send(signal.Signals[case.number])
        sent = time.time()
        ended = running.wait(STOP_SECONDS + 20.0)
    seconds = ended.unix_time - sent
    code = CODES.get(case.starter, StoppedError.exit_code)
    expect(ended.code == code, f"it did not end with {code} after {seconds:.1f} s: {ended}")
    expect(seconds < STOP_SECONDS, f"it took {seconds:.1f} s to stop: {ended}")
    if case.phase not in (START, "warm_up") or evidence.checkpoints(folder):
        expect(evidence.outcome_of(folder).code == StoppedError.exit_code, f"outcome.json says otherwise: {ended}")
        evidence.expect_valid_checkpoint(folder)
    again = run(Ranks("warm", case.ranks, resume=True), folder)
    expect(again.code == 0, f"the run could not go on: {again}")
    expect_same_end(folder, case.ranks)
    return seconds, f"stopped after {seconds:.1f} s, goes on, same weights"


def _task(case: Stop) -> dict[str, Any]:
    if case.phase == START:
        return {"step_seconds": SLOW_SECONDS}
    # A worker fetches when it can: the rank itself goes by its steps.
    phase = "forward" if case.phase == "data" and case.workers else case.phase
    task = {"action": "announce", "phase": phase, "rank": case.step % case.ranks, "step": case.step}
    return {**task, "hold_seconds": HOLD_SECONDS, "step_seconds": 0.01}


def _wait_for_the_moment(case: Stop, running: Running, folder: Path) -> None:
    if case.phase == START:
        running.wait_for(lambda: evidence.rank_processes(running.process.pid) >= case.ranks, START_SECONDS, "its ranks")
    else:
        running.wait_for(lambda: evidence.harm(folder), START_SECONDS, f"the phase {case.phase}")


ROW = Row(
    "stop",
    "SIGTERM or SIGUSR1 at any time",
    "all ranks agree, checkpoint saved, exit 75, within 25 s; goes on to the same weights",
    100,
    cases,
    check,
)
