"""A rank that is there and says nothing: stopped by SIGSTOP, or behind a link that is cut. Named within the deadline."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, refusal
from ddp import outcome
from faults import evidence
from faults.running import ENVIRONMENT, Ranks, kill_all, started
from faults.small_job import START_SECONDS, write_job
from faults.verdict import Row, UnexpectedError, dealt, expect
from launch.submit import descendants, free_port

TIMEOUT_SECONDS = 5.0
NOTICE_SECONDS = 5.0  # after the timeout, to find out who it was and to say so
CALL_SECONDS = 10.0  # the same between nodes, where a roll call waits once more
END_SECONDS = 20.0  # to take an interpreter down where other work keeps the cores busy
AGE_SECONDS = 2.0  # of the last step, when the metrics are looked at
PHASES = ("data", "forward", "all_reduce", "optimizer", "save", "evaluation")
LAST_STEP = "ddp_last_step_timestamp_seconds"


@dataclass(frozen=True)
class Stopped:
    """Which rank is stopped where."""

    ranks: int
    rank: int
    phase: str
    step: int


def stopped_cases(generator: random.Random, count: int) -> Sequence[Stopped]:
    phases, worlds = dealt(generator, PHASES, count), dealt(generator, (2, 3), count)
    return [
        Stopped(ranks, generator.randrange(ranks), phase, generator.randint(2, 20))
        for phase, ranks in zip(phases, worlds, strict=True)
    ]


def check_stopped(case: Stopped, folder: Path) -> tuple[float, str]:
    task = {"action": "stop", "phase": case.phase, "rank": case.rank, "step": case.step}
    write_job(folder, task, transport__timeout_seconds=TIMEOUT_SECONDS, metrics__enabled=True)
    file = folder / evidence.RUN / outcome.FILE_NAME
    with started(Ranks("warm", case.ranks), folder) as running:
        running.wait_for(lambda: evidence.harm(folder), START_SECONDS, f"the phase {case.phase}")
        since = (evidence.harm(folder) or {})["time"]
        age = None if case.rank == 0 else _age(folder)  # rank 0 serves the page
        # The launcher itself waits half a minute for the stopped rank to heed its SIGTERM.
        running.wait_for(file.exists, TIMEOUT_SECONDS + NOTICE_SECONDS + END_SECONDS, "a word of a survivor")
        running.wait_for(lambda: outcome.read(file), 1.0, "a whole outcome.json")
        seconds = file.stat().st_mtime - since
    cause = evidence.outcome_of(folder).cause
    expect(re.search(rf"\brank {case.rank}\b", cause), f"rank {case.rank} is not named: {cause}")
    expect(seconds < TIMEOUT_SECONDS + NOTICE_SECONDS, f"named only after {seconds:.1f} s: {cause}")
    return seconds, cause if age is None else f"{cause}; last step {age:.1f} s old on the metrics page"


def _age(folder: Path) -> float:
    """Of the last step on the metrics page, once it must have begun to age."""
    time.sleep(AGE_SECONDS)
    moment = evidence.metric(folder, LAST_STEP)
    expect(moment, f"the metrics page does not answer with {LAST_STEP}")
    age = time.time() - (moment or 0.0)
    expect(age >= AGE_SECONDS, f"{LAST_STEP} is only {age:.1f} s old")
    return age


@dataclass(frozen=True)
class Cut:
    """Two ranks on each of two nodes; one node's link is cut."""

    transport: str
    node: int
    step: int


def cut_cases(generator: random.Random, count: int) -> Sequence[Cut]:
    ways = dealt(generator, [(transport, node) for transport in ("hierarchical", "c10d") for node in (0, 1)], count)
    return [Cut(*way, generator.randint(2, 20)) for way in ways]


def check_cut(case: Cut, folder: Path) -> tuple[float, str]:
    task = {"action": "announce", "phase": "forward", "rank": 3, "step": case.step, "step_seconds": 0.02}
    settings = {"run__steps": 100_000, "metrics__enabled": True, "evaluation__every_steps": 1000}
    write_job(folder, task, transport__timeout_seconds=TIMEOUT_SECONDS, transport__name=case.transport, **settings)
    file = folder / evidence.RUN / outcome.FILE_NAME
    with Cluster(nodes=2) as cluster, _ranks(cluster, folder) as ranks:
        _wait_for_harm(folder, ranks)
        cluster.nodes[case.node].unplug()
        since = time.time()
        age = _age_inside(cluster, folder)
        said = _causes(ranks, TIMEOUT_SECONDS + CALL_SECONDS + END_SECONDS)
        seconds = file.stat().st_mtime - since
    expect(seconds < TIMEOUT_SECONDS + CALL_SECONDS, f"named only after {seconds:.1f} s: {said}")
    for rank, text in enumerate(said):
        beyond = [other for other in range(4) if other // 2 != rank // 2]
        near = "error:" not in text or any(re.search(rf"\brank {other}\b", text) for other in beyond)
        expect(near, f"rank {rank} names no rank of the other node: {text}")
    causes = [line for text in said for line in text.splitlines() if line.startswith("error:")]
    expect(causes, f"no rank said why it ended: {said}")
    return seconds, f"{causes[0]}; last step {age:.1f} s old on the metrics page"


@contextlib.contextmanager
def _ranks(cluster: Cluster, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Each rank with the variables that torchrun would give it, and no agent that ends it."""
    common = {
        **ENVIRONMENT,
        "MASTER_ADDR": cluster.nodes[0].name,
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "ddp", "train", "job.toml", "--allow-import", "faulty_task"]
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(4):
            node, local = divmod(rank, 2)
            own = {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
            processes.append(cluster.nodes[node].popen(command, folder, {**common, **own}))
        yield processes
    finally:
        for process in processes:
            kill_all([*descendants(process.pid), process.pid])
            process.communicate(timeout=10)


def _wait_for_harm(folder: Path, ranks: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while evidence.harm(folder) is None:
        if time.monotonic() > deadline or any(rank.poll() is not None for rank in ranks):
            raise UnexpectedError("the ranks did not come to train")
        time.sleep(0.02)


def _age_inside(cluster: Cluster, folder: Path) -> float:
    """Of the last step on the metrics page, which answers on the first node only."""
    time.sleep(AGE_SECONDS)
    address = evidence.metrics_address(folder)
    program = f"import urllib.request as r; print(r.urlopen('http://{address}/metrics', timeout=5).read().decode())"
    page = cluster.nodes[0].run([sys.executable, "-c", program], folder).stdout
    moment = evidence.value_on(page, LAST_STEP)
    expect(moment, f"the metrics page does not answer with {LAST_STEP}")
    age = time.time() - (moment or 0.0)
    expect(age >= AGE_SECONDS / 2, f"{LAST_STEP} is only {age:.1f} s old")
    return age


def _causes(ranks: Sequence[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each rank wrote to its standard error; all of them ended with code 1."""
    deadline = time.monotonic() + seconds
    said: list[str] = []
    for rank, process in enumerate(ranks):
        try:
            _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise UnexpectedError(f"rank {rank} still runs {seconds:g} s after the cut") from None
        expect(process.returncode == 1, f"rank {rank} ended with {process.returncode}: {errors}")
        said.append(errors)
    return said


PROMISE = "named within the deadline; the last step ages on the metrics page"
STOPPED = Row("sigstop", "SIGSTOP of one rank", PROMISE, 12, stopped_cases, check_stopped)
CUT = Row("partition", "network partition between namespaces", PROMISE, 8, cut_cases, check_cut, refusal)
