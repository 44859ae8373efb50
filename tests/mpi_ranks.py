"""Run a function on real ranks under mpirun, once for a whole matrix of cases. For tests only.

    def averages(rank: int, world_size: int, folder: Path) -> list[float]: ...

    def test_averages(mpi: MpiEnvironment, tmp_path: Path) -> None:
        results = run_under_mpi(mpi, 4, averages, tmp_path)          # one result a rank, in rank order

A launch takes two seconds. The function must live at the top of a test module; it runs within the default
process group, and arguments and results are pickled. A rank that raises fails the test with its traceback.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp.process_group import initialise, shutdown
from ddp.topology import from_environment
from jobs import run_command
from mpi_environments import MpiEnvironment


def run_under_mpi(
    mpi: MpiEnvironment, ranks: int, function: Callable[..., Any], folder: Path, *args: Any, timeout: float = 90.0
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on each of `ranks` ranks and return the results in rank order."""
    (folder / "call").write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
    environment = {**mpi.variables, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = run_command(mpi.command(ranks, __file__, str(folder)), folder, environment, timeout=timeout)
    assert ended.code == 0, ended
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(ranks)]


def groups(world_size: int) -> dict[int, dist.ProcessGroup | None]:
    """For each size up to all ranks the group of the first so many, None for a rank outside. Collective."""
    made: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in range(1, world_size + 1)}
    return {size: group if dist.get_rank() < size else None for size, group in made.items()}


def _serve(folder: Path) -> None:
    topology = from_environment(os.environ)
    torch.set_num_threads(1)
    initialise(topology, "cpu", 60.0)
    module, name, args = pickle.loads((folder / "call").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = getattr(importlib.import_module(module), name)(topology.rank, topology.world_size, *args)
    (folder / f"result-{topology.rank}").write_bytes(pickle.dumps(result))
    shutdown()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
