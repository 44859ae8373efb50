"""What the benchmarks share: ranks that start themselves, interleaved timing, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ddp.process_group import initialise, shutdown
from ddp.topology import from_environment

Figures = dict[str, dict[str, float]]  # seconds, by case and contender
INSIDE = "DDP_BENCHMARK_RANK"


def start_ranks(ranks: int, *arguments: str) -> int:
    """Run this script again as `ranks` ranks under Open MPI, one core and one thread each where cores suffice."""
    mpirun = Path(sysconfig.get_path("scripts")) / "mpirun"
    cores = len(os.sched_getaffinity(0))
    binding = ["--bind-to", "core"] if ranks <= cores else ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        INSIDE: "1",
    }
    command = [str(mpirun), *binding, "-n", str(ranks), sys.executable, *sys.argv, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


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
        return start_ranks(arguments.ranks)
    topology = from_environment(os.environ)
    torch.set_num_threads(1)
    initialise(topology, "cpu", 120.0)
    figures = measure(arguments)
    if topology.rank == 0:
        print(show(figures, topology.world_size), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"machine": machine(), "seconds": figures}, indent=2) + "\n")
    shutdown()
    return 0


def inside_ranks() -> bool:
    return INSIDE in os.environ


def machine() -> str:
    """One line that names the machine and the versions."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0)) if not inside_ranks() else os.cpu_count()
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"


def interleaved_medians(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, prepare: Callable[[], object]
) -> dict[str, float]:
    """Median seconds a call: `rounds` times, each contender in turn makes `calls` calls after `prepare`, untimed.

    `prepare` ends in a barrier, so that the ranks begin together.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, call in contenders.items():
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
