"""What the benchmarks share: ranks that start themselves, interleaved timing, tables and JSON.

`run` is a whole benchmark of one start of the ranks; one of several starts, in places of several kinds, begins with
`places`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from ddp.process_group import initialise, shutdown
from ddp.topology import from_environment
from places import Environment, Figures, Place, inside_ranks, start_ranks

PR_SET_PDEATHSIG = 1


def run(
    description: str | None,
    options: Callable[[argparse.ArgumentParser], object],
    measure: Callable[[argparse.Namespace], Figures],
    show: Callable[[Figures, int], str],
) -> int:
    """A whole benchmark: parse, start the ranks, measure on all of them, print and write on rank 0."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options(parser)
    arguments = parser.parse_args()
    if not inside_ranks():
        return start_ranks(Environment.of(sys.executable), arguments.ranks, {})
    topology = from_environment(os.environ)
    Place.of(arguments.ranks).take(topology.local_rank)
    torch.set_num_threads(1)
    initialise(topology, "cpu", 120.0)
    figures = measure(arguments)
    if topology.rank == 0:
        print(show(figures, topology.world_size), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"machine": machine(), "seconds": figures}, indent=2) + "\n")
    shutdown()
    return 0


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleLimits:
    """How long to measure one contender: rounds end after `seconds` of it, but not before the fewest."""

    seconds: float
    sample_seconds: float  # of calls in a row, timed together
    fewest_rounds: int = 3
    most_rounds: int = 101
    most_calls: int = 2000

    @classmethod
    def of(cls, place: Place, seconds: float) -> Self:
        """Where ranks take turns on a core, a sample lasts for several of their time slices."""
        return cls(seconds, 0.05 if place.is_crowded else 0.005)


class Neighbour:
    """A process that only burns time, stopped until it is told to work. Where not `wanted`, nothing at all."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._wanted:
            burn = [sys.executable, "-c", "while True: pass"]
            self._process = subprocess.Popen(burn, preexec_fn=_die_with_the_parent)  # noqa: PLW1509  only forks here
            self.rest()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def rest(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def work(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


def _die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def medians_within(
    limits: SampleLimits,
    contenders: Mapping[str, tuple[Callable[[], object], Callable[[], None]]],
    prepare: Callable[[], object],
) -> dict[str, float]:
    """Median seconds a call of each contender, which take turns. Collective over MPI's world.

    Args:
        limits: how long.
        contenders: what is called and, before each sample, what makes its surroundings.
        prepare: called before each sample, too, untimed.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def sample(name: str, calls: int) -> float:
        call, surround = contenders[name]
        surround()
        prepare()
        comm.Barrier()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    calls = _calls(comm, limits, [min(sample(name, 1) for _ in range(2)) for name in contenders])
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    running = bytearray(b"\1" * len(contenders))
    for round_ in range(limits.most_rounds):
        for index, name in enumerate(contenders):
            if running[index]:
                samples[name].append(sample(name, calls[index]))
                spent = sum(samples[name]) * calls[index]
                running[index] = round_ + 1 < limits.fewest_rounds or spent < limits.seconds
        comm.Bcast(running)  # rank 0's clock decides
        if not any(running):
            break
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def _calls(comm: Any, limits: SampleLimits, seconds: Sequence[float]) -> list[int]:
    """How many calls make a sample, as rank 0 sees it: the same on all ranks."""
    calls = torch.tensor([min(limits.most_calls, max(1, round(limits.sample_seconds / each))) for each in seconds])
    comm.Bcast(calls.numpy())
    return calls.tolist()


def machine() -> str:
    """One line that names the machine and the versions."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0)) if not inside_ranks() else os.cpu_count()
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"


def interleaved_medians(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
    settle: int = 0,
    prepare: Callable[[], object],
) -> dict[str, float]:
    """Median seconds a call: `rounds` times, each contender in turn makes `calls` calls after `prepare`, untimed.

    `prepare` ends in a barrier, so that the ranks begin together. Before it come `settle` calls, for what
    remembers who came last: caches, and memory that was given back or kept.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, call in contenders.items():
            for _ in range(settle):
                call()
            prepare()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            if round_:  # the first is for warming up
                samples[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def slowest_of_ranks(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each figure's maximum over the ranks."""
    values = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(seconds, values.tolist(), strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
