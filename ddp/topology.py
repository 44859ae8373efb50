"""Who this process is among the ranks, read from the launcher's environment variables. Loads no torch.

One table says which variable of which launcher means what; the first family that has left any trace wins,
and is then judged alone: mpirun inside a Slurm allocation shows Slurm's variables too, and they say nothing
about Open MPI's ranks. Nothing here guesses: a family that is incomplete or contradicts itself is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ddp.errors import TopologyError

Launcher = Literal["torchrun", "openmpi", "pmi", "slurm", "none"]


@dataclass(frozen=True, slots=True)
class Topology:
    """This process's place: `rank` of `world_size`, `local_rank` of the `local_world_size` on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int | None = 0  # None where the launcher numbers no nodes and there are several
    launcher: Launcher = "none"
    restarts: int = 0

    @property
    def one_node(self) -> bool:
        """Whether all ranks run on this node."""
        return self.local_world_size == self.world_size

    @property
    def under_mpi(self) -> bool:
        """Whether an mpirun started this process."""
        return self.launcher in ("openmpi", "pmi")


SINGLE_PROCESS = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1)


@dataclass(frozen=True, slots=True)
class _Family:
    """The variables of one launcher; any of `traces` makes the family win."""

    launcher: Launcher
    traces: tuple[str, ...]
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    node: str | None
    restarts: str = ""
    also_needed: tuple[str, ...] = ()


# Counted by whoever starts the launcher: a scheduler that puts a job into its queue again, and `launch`.
RESTARTED_FROM_OUTSIDE = ("SLURM_RESTART_COUNT", "DDP_RESTART_COUNT")

FAMILIES = (
    _Family(
        "torchrun",
        traces=("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_world_size="LOCAL_WORLD_SIZE",
        node="GROUP_RANK",
        restarts="TORCHELASTIC_RESTART_COUNT",
        also_needed=("MASTER_ADDR", "MASTER_PORT"),
    ),
    _Family(
        "openmpi",
        traces=(
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        node=None,
    ),
    _Family(
        "pmi",
        traces=("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_world_size="MPI_LOCALNRANKS",
        node=None,
    ),
    # SLURM_PROCID alone is no trace: a batch script has it too, and a plain process there is one process.
    _Family(
        "slurm",
        traces=("SLURM_STEP_ID",),
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_world_size="SLURM_STEP_TASKS_PER_NODE",  # of every node: "2(x3),1"
        node="SLURM_NODEID",
    ),
)


def from_environment(environ: Mapping[str, str]) -> Topology:
    """The place of this process, by the first family in `FAMILIES` that left a trace in `environ`.

    Raises:
        TopologyError: variables of that family are missing, malformed or contradict each other.
    """
    for family in FAMILIES:
        if any(name in environ for name in family.traces) and not _is_slurms_pmi(family, environ):
            return _read(family, environ)
    return replace(SINGLE_PROCESS, restarts=_restarts("", environ))


def _is_slurms_pmi(family: _Family, environ: Mapping[str, str]) -> bool:
    """srun --mpi=pmi2 leaves PMI_RANK and PMI_SIZE too; an mpirun adds the local ones."""
    local = {family.local_rank, family.local_world_size}
    return family.launcher == "pmi" and "SLURM_STEP_ID" in environ and not local & environ.keys()


def _read(family: _Family, environ: Mapping[str, str]) -> Topology:
    needed = (family.rank, family.world_size, family.local_rank, family.local_world_size, *family.also_needed)
    if missing := [name for name in needed if name not in environ]:
        found = [name for name in (*family.traces, *needed) if name in environ]
        raise TopologyError(
            f"{', '.join(dict.fromkeys(found))} set, but not {', '.join(missing)}: start the ranks with a launcher "
            "(torchrun, mpirun, srun), or unset what is left of one to run a single process"
        )
    topology = Topology(
        rank=_integer(environ, family.rank),
        world_size=_integer(environ, family.world_size),
        local_rank=_integer(environ, family.local_rank),
        local_world_size=_local_world_size(family, environ),
        node=_node(family, environ),
        launcher=family.launcher,
        restarts=_restarts(family.restarts, environ),
    )
    _check(topology, family, environ)
    return topology


def _restarts(own: str, environ: Mapping[str, str]) -> int:
    """How often this run was started before, by the launcher's own count and by those around it."""
    return sum(_integer(environ, name) for name in (own, *RESTARTED_FROM_OUTSIDE) if name in environ)


def _node(family: _Family, environ: Mapping[str, str]) -> int | None:
    if family.node is not None and family.node in environ:
        return _integer(environ, family.node)
    one_node = environ[family.local_world_size] == environ[family.world_size]
    return 0 if one_node else None


def _local_world_size(family: _Family, environ: Mapping[str, str]) -> int:
    if family.launcher != "slurm":
        return _integer(environ, family.local_world_size)
    tasks = _tasks_per_node(environ[family.local_world_size])
    node = _node(family, environ) or 0
    if node < len(tasks):
        return tasks[node]
    raise TopologyError(
        f"SLURM_NODEID={node} and SLURM_STEP_TASKS_PER_NODE={environ[family.local_world_size]} contradict each other"
    )


def _tasks_per_node(text: str) -> list[int]:
    """`"2(x3),1"` to [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise TopologyError(f"SLURM_STEP_TASKS_PER_NODE={text} is not a list of task counts")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _integer(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]+", environ[name]):
        raise TopologyError(f"{name}={environ[name]} is not a number of 0 or more: the launcher should set it")
    return int(environ[name])


def _check(topology: Topology, family: _Family, environ: Mapping[str, str]) -> None:
    contradictions = (
        (topology.rank >= topology.world_size, family.rank, family.world_size),
        (topology.local_rank >= topology.local_world_size, family.local_rank, family.local_world_size),
        (topology.local_world_size > topology.world_size, family.local_world_size, family.world_size),
        (topology.one_node and topology.local_rank != topology.rank, family.local_rank, family.rank),
    )
    for wrong, first, second in contradictions:
        # Open MPI numbers a node's ranks in the order of its map, which --rank-by can change.
        if wrong and not (family.launcher == "openmpi" and second == family.rank):
            raise TopologyError(
                f"{first}={environ[first]} and {second}={environ[second]} contradict each other: "
                "start the ranks with one launcher, and do not set its variables by hand"
            )
