"""Where a benchmark's ranks run: under which MPI, pinned or not, alone or beside a busy process.

Ranks are this script once more, with variables in their environment that say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mpi4py
import torch

from ddp.process_group import initialise, shutdown
from ddp.topology import from_environment
from launch.mpirun import find, flavour_of
from launch.submit import core_count

Figures = dict[str, dict[str, float]]  # seconds, by case and contender
INSIDE = "DDP_BENCHMARK_RANK"
CASE = "DDP_BENCHMARK_CASE"
FIGURES = "DDP_BENCHMARK_FIGURES"
MPICH_PYTHON = Path(__file__).resolve().parent.parent / ".venv-mpich" / "bin" / "python"
START_SECONDS = 1800.0  # nothing that is measured here takes so long


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python with mpi4py, and the mpirun of the same MPI."""

    mpi: str  # a `launch.mpirun.Flavour`
    python: str
    mpirun: str

    @classmethod
    def of(cls, python: str) -> Self:
        mpirun = find(python, os.environ.get("PATH"))
        return cls(flavour_of(mpirun), python, mpirun)

    def command(self, ranks: int, arguments: Sequence[str]) -> list[str]:
        """The argv of `python *arguments` as that many ranks, bound to nothing."""
        crowded = ["--map-by", ":OVERSUBSCRIBE"] if self.mpi == "openmpi" and ranks > core_count() else []
        unbound = ["--bind-to" if self.mpi == "openmpi" else "-bind-to", "none"]
        return [self.mpirun, *crowded, *unbound, "-n", str(ranks), self.python, *arguments]


@dataclass(frozen=True, slots=True)
class Place:
    """How many ranks there are and what they share the cores with."""

    ranks: int
    pinned: bool
    busy_neighbour: bool = False

    @classmethod
    def of(cls, ranks: int, placement: str | None = None, busy_neighbour: bool = False) -> Self:
        """Pinned where everyone gets a core, unless `placement` says otherwise."""
        pinned = placement == "pinned" if placement else ranks <= core_count() and not busy_neighbour
        return cls(ranks, pinned, busy_neighbour)

    @property
    def is_crowded(self) -> bool:
        return self.ranks + self.busy_neighbour > core_count()

    def text(self) -> str:
        where = "unpinned" if not self.pinned else "pinned in turn" if self.is_crowded else "pinned to a core each"
        crowd = f" on {core_count()} cores" if self.ranks > core_count() else ""
        return f"{self.ranks} ranks{crowd}, {where}" + (", beside a busy process by turns" * self.busy_neighbour)

    def take(self, local_rank: int) -> None:
        """Pin this process, threads to come included, where that is asked for."""
        cores = sorted(os.sched_getaffinity(0))
        if self.pinned:
            os.sched_setaffinity(0, {cores[local_rank % len(cores)]})


def environments(names: Iterable[str]) -> dict[str, Environment]:
    """The environments of these MPIs, this Python's first; what is missing is left out and said."""
    pythons = [sys.executable, *([str(MPICH_PYTHON)] if MPICH_PYTHON.exists() else [])]
    there = {found.mpi: found for found in map(Environment.of, dict.fromkeys(pythons))}
    wanted = list(names)
    for name in wanted:
        if name not in there:
            print(f"without {name}: there is no environment of it (`make bench` makes them)", file=sys.stderr)
    if not (chosen := {name: there[name] for name in there if name in wanted}):
        sys.exit("error: nothing to measure")
    return chosen


def start_ranks(environment: Environment, ranks: int, variables: Mapping[str, str]) -> int:
    """Run this script again as `ranks` ranks of one thread, and return mpirun's exit code."""
    given = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        INSIDE: "1",
        **variables,
    }
    command = environment.command(ranks, sys.argv)
    return subprocess.run(command, env=given, check=False, timeout=START_SECONDS).returncode


def start_case(environment: Environment, ranks: int, case: str) -> Figures:
    """Start the ranks with `case`, and return what rank 0 wrote; ends this process where they fail."""
    with tempfile.TemporaryDirectory(prefix="ddp-benchmark-") as folder:
        file = Path(folder, "figures.json")
        code = start_ranks(environment, ranks, {CASE: case, FIGURES: str(file)})
        if code != 0 or not file.exists():
            sys.exit(f"error: the ranks under {environment.mpirun} ended with code {code}")
        return json.loads(file.read_text())


def inside_ranks() -> bool:
    return INSIDE in os.environ


def inside_case() -> str | None:
    """The case that this rank was started with; None outside of ranks."""
    return os.environ.get(CASE)


@contextlib.contextmanager
def rank_group(place: Place, thread_level: str | None = None) -> Generator[Callable[[Figures], None]]:
    """This rank in its place and in the process group; gives what rank 0 hands its figures over with."""
    topology = from_environment(os.environ)
    place.take(topology.local_rank)
    torch.set_num_threads(1)
    if thread_level is not None:
        mpi4py.rc.thread_level = thread_level
    initialise(topology, "cpu", 120.0)

    def write(figures: Figures) -> None:
        if topology.rank == 0:
            Path(os.environ[FIGURES]).write_text(json.dumps(figures))

    yield write
    shutdown()
