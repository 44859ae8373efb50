"""What watches a run gives way: the record is locked, the metrics port is lost, the disk is full. And stragglers."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import evidence
from faults.running import Ranks, Running, run, started
from faults.small_job import START_SECONDS, expect_same_end, write_job
from faults.verdict import Row, dealt, expect

STRAGGLING_SECONDS = 0.03
SEEN_IN_A_ROW = 10


@dataclass(frozen=True)
class Straggler:
    """Which rank sleeps in which phase of every step."""

    ranks: int
    rank: int
    phase: str


def straggler_cases(generator: random.Random, count: int) -> Sequence[Straggler]:
    phases, worlds = dealt(generator, ("forward", "data", "all_reduce"), count), dealt(generator, (2, 3), count)
    return [Straggler(ranks, generator.randrange(ranks), phase) for phase, ranks in zip(phases, worlds, strict=True)]


def check_straggler(case: Straggler, folder: Path) -> tuple[float, str]:
    task = {"action": "sleep", "phase": case.phase, "rank": case.rank, "step": 1, "hold_seconds": STRAGGLING_SECONDS}
    write_job(folder, task, metrics__enabled=True, run__steps=120, evaluation__every_steps=50)
    seen: list[float] = []

    def is_named() -> bool:
        value = evidence.metric(folder, "ddp_straggler_rank")
        seen.append(-1.0 if value is None else value)
        return len(seen) >= SEEN_IN_A_ROW and set(seen[-SEEN_IN_A_ROW:]) == {case.rank}

    with started(Ranks("warm", case.ranks), folder) as running:
        running.wait_for(is_named, START_SECONDS, f"ddp_straggler_rank {case.rank}")
        ended = running.wait(START_SECONDS)
    expect(ended.code == 0, f"the run failed: {ended}")
    counts = _stragglers(folder / evidence.RUN / "run.db")
    # A window of steps and some judgements that agree come first; after them nobody else may be named, nor nobody.
    named = counts[case.rank]
    expect(named + counts[-1] == counts.total(), f"the record names another rank than {case.rank} too: {counts}")
    expect(named > 0.4 * counts.total(), f"the record names rank {case.rank} in {named} steps only: {counts}")
    page = re.sub(r"<[^>]*>", " ", (folder / evidence.RUN / "report.html").read_text())
    found = re.search(
        rf"straggl.{{0,200}}?rank\s+{case.rank}\b|rank\s+{case.rank}\b.{{0,200}}?straggl", page, re.I | re.S
    )
    expect(found, f"the report does not name rank {case.rank} as the straggler")
    return 0.0, f"named on the metrics page, in the record from {counts[-1]} steps on, in the report"


def _stragglers(record: Path) -> Counter[int]:
    with contextlib.closing(sqlite3.connect(record)) as database:
        return Counter(rank for (rank,) in database.execute("SELECT straggler_rank FROM steps"))


@dataclass(frozen=True)
class Blind:
    """What is taken away from the run: record (its lock), port_at_start, port_at_restart."""

    what: str
    step: int


def blind_cases(generator: random.Random, count: int) -> Sequence[Blind]:
    kinds = dealt(generator, ("record", "port_at_start", "port_at_restart"), count)
    return [Blind(what, generator.randint(2, 20)) for what in kinds]


def check_blind(case: Blind, folder: Path) -> tuple[float, str]:
    return {"record": _lock_record, "port_at_start": _take_port, "port_at_restart": _take_port_later}[case.what](
        case, folder
    )


def _lock_record(case: Blind, folder: Path) -> tuple[float, str]:
    write_job(folder, {"action": "announce", "rank": 0, "step": case.step, "step_seconds": 0.03})
    with started(Ranks("warm", 2), folder) as running:
        running.wait_for(lambda: evidence.harm(folder), START_SECONDS, f"step {case.step}")
        with _locked(folder / evidence.RUN / "run.db", running):
            ended = running.wait(START_SECONDS)
    expect(ended.code == 0, f"the run did not go on: {ended}")
    expect("the record of the run is incomplete" in ended.stderr, f"nothing was said: {ended}")
    expect_same_end(folder, 2)
    return 0.0, "goes on, says so"


@contextlib.contextmanager
def _locked(record: Path, running: Running) -> Iterator[None]:
    """Nobody else can write to the record meanwhile."""
    running.wait_for(record.exists, START_SECONDS, "the record")
    with contextlib.closing(sqlite3.connect(record, timeout=10.0, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield


def _take_port(_case: Blind, folder: Path) -> tuple[float, str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        write_job(folder, metrics__enabled=True, metrics__port=port)
        ended = run(Ranks("launch torchrun", 2), folder)
    expect(ended.code in (0, 2), f"neither went on nor refused the job: {ended}")
    said = next((line for line in ended.stderr.splitlines() if str(port) in line), None)
    expect(said, f"the port {port} is not named: {ended}")
    if ended.code == 0:
        expect_same_end(folder, 2)
    return 0.0, said or ""


def _take_port_later(case: Blind, folder: Path) -> tuple[float, str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    task = {"action": "kill", "phase": "forward", "rank": 0, "step": case.step}
    write_job(folder, task, metrics__enabled=True, metrics__port=port)
    with started(Ranks("torchrun", 2, restarts=3), folder) as running, contextlib.ExitStack() as stack:

        def is_taken() -> bool:
            if evidence.harm(folder) is not None:
                with contextlib.suppress(OSError):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                    return True
            return False

        running.wait_for(is_taken, START_SECONDS, "the port to be free")
        ended = running.wait(START_SECONDS)
    expect(ended.code == 0, f"a lost port ended the run: {ended}")
    expect(str(port) in ended.stderr, f"the port {port} is not named: {ended}")
    expect_same_end(folder, 2)
    return 0.0, "goes on after a restart, says so"


@dataclass(frozen=True)
class Full:
    """When the disk of the run directory is full, and how much is left then."""

    phase: str
    step: int
    spare_bytes: int


def full_cases(generator: random.Random, count: int) -> Sequence[Full]:
    phases = dealt(generator, ("forward", "save", "evaluation"), count)
    return [
        Full(phase, generator.randint(8, 20), generator.choice((0, generator.randrange(30_000)))) for phase in phases
    ]


def check_full(case: Full, folder: Path) -> tuple[float, str]:
    task = {"action": "fill", "phase": case.phase, "rank": 0, "step": case.step, "spare_bytes": case.spare_bytes}
    write_job(folder, task, checkpoint__every_steps=3)
    command = " ".join(Ranks("launch torchrun", 2).argv())
    ended = run(["unshare", "--mount", "sh", "-c", ON_SMALL_DISK.format(command=command)], folder)
    harm = evidence.harm_done(folder, ended)
    (folder / "runs").rmdir()
    (folder / "left").rename(folder / "runs")
    (folder / evidence.RUN / "checkpoints" / "filler").unlink(missing_ok=True)
    expect(ended.code in (0, 1), f"it ended with {ended.code}: {ended}")
    lines = [line for line in ended.stderr.splitlines() if re.search(r"No space|is full|\bfree on\b.*make room", line)]
    said = next((line for line in lines if ended.code == 0 or line.startswith("error:")), None)
    expect(said, f"nobody said that the disk is full: {ended}")
    evidence.expect_valid_checkpoint(folder)
    if ended.code == 1:
        ended_again = run(Ranks("warm", 2, resume=True), folder)
        expect(ended_again.code == 0, f"it could not go on with space again: {ended_again}")
    expect_same_end(folder, 2)
    return ended.unix_time - harm["time"], f"code {ended.code}, goes on to the same weights: {said}"


# What the mount holds goes with the shell.
ON_SMALL_DISK = "mkdir runs left && mount -t tmpfs -o size=6m tmpfs runs || exit 99; {command}; code=$?; cp -a runs/. left/; exit $code"


def no_small_disk() -> str | None:
    """Why there can be no file system of its own for a run here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a small file system needs root on Linux"
    return None if shutil.which("unshare") else "a small file system needs Debian's util-linux"


STRAGGLER = Row(
    "straggler",
    "a straggler (sleep in one rank)",
    "named by its own time on Prometheus and in the report",
    9,
    straggler_cases,
    check_straggler,
)
BLIND = Row(
    "telemetry",
    "SQLite locked, metrics port taken at the start or at a restart",
    "training goes on, or is refused with a clear message",
    9,
    blind_cases,
    check_blind,
)
FULL = Row(
    "disk-full",
    "disk of the run directory full (small tmpfs)",
    "a clear message; a valid checkpoint is there and is resumed to the same weights",
    12,
    full_cases,
    check_full,
    no_small_disk,
)
