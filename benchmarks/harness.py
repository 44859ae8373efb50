"""What the benchmarks share: ranks that start themselves, interleaved timing, tables and JSON."""

from __future__ import annotations

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
from typing import Any

import torch
import torch.distributed as dist

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


def write_json(path: str | None, figures: Any) -> None:
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")
