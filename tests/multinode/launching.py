"""How ranks are started on the nodes of a cluster: torchrun on each, mpirun from the head, or one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster import Cluster
from jobs import Ended, environment, python
from launch.submit import descendants, free_port
from mpi_environments import MpiEnvironment

TESTS = Path(__file__).resolve().parent.parent
VARIABLES = environment({"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])})


def torchrun(cluster: Cluster, ranks_per_node: int, arguments: Sequence[str], folder: Path) -> list[Ended]:
    """`torchrun` on every node; they meet on the first."""
    argv = python(
        "-m", "torch.distributed.run", f"--nnodes={len(cluster.nodes)}", f"--nproc-per-node={ranks_per_node}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={cluster.nodes[0].name}:29400", "--rdzv-id=run", *arguments,
    )  # fmt: skip
    return finish([node.popen(argv, folder, VARIABLES) for node in cluster.nodes])


def mpirun(cluster: Cluster, mpi: MpiEnvironment, ranks_per_node: int, arguments: Sequence[str], folder: Path) -> Ended:
    """`mpirun` on the head; ranks fill one node after the other."""
    passed_on = ["-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"] if mpi.name == "openmpi" else []
    ranks = len(cluster.nodes) * ranks_per_node
    command = mpi.command(ranks, *arguments)
    argv = [command[0], *cluster.mpirun_options(mpi.name, ranks_per_node), *passed_on, *command[1:]]
    return finish([cluster.head.popen(argv, folder, {**VARIABLES, **mpi.variables})])[0]


@contextlib.contextmanager
def ranks_one_by_one(
    cluster: Cluster, ranks_per_node: int, arguments: Sequence[str], folder: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Every rank with the variables that torchrun would give it, and no agent that ends it; killed on the way out."""
    size, first = len(cluster.nodes) * ranks_per_node, cluster.nodes[0]
    common = {"MASTER_ADDR": first.name, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(size):
            node, local = divmod(rank, ranks_per_node)
            own = {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
            variables = {**VARIABLES, **common, **own, "LOCAL_WORLD_SIZE": str(ranks_per_node)}
            started.append(cluster.nodes[node].popen(python(*arguments), folder, variables))
        yield started
    finally:
        _end(started)


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 90.0) -> list[Ended]:
    """How each of them ended; past the deadline all are killed and the test fails."""
    deadline = time.monotonic() + timeout
    ended: list[Ended] = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended.append(Ended(process.returncode, stdout, stderr))
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"still running after {timeout:g} s: {error.stdout}\n{error.stderr}") from None
    finally:
        _end(processes)
    return ended


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            for each in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        process.wait(10)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
