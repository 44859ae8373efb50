"""The mpirun command for one node, under Open MPI or MPICH, and where its mpirun is."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from ddp.errors import UsageError

VERSION_SECONDS = 30.0  # for an mpirun on a slow file system to say its version

# Open MPI leaves the ranks 0.25 s after a SIGTERM, too little for a checkpoint; SIGUSR1 both just pass on.
SIGNALS: Mapping[int, int] = {
    signal.SIGTERM: signal.SIGUSR1,
    signal.SIGINT: signal.SIGUSR1,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR1,
    signal.SIGQUIT: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGUSR1,
}


class Flavour(StrEnum):
    """Whose mpirun it is, which decides what it understands."""

    openmpi = "openmpi"
    mpich = "mpich"  # Hydra, also that of MPICH's descendants


def render(
    worker: Sequence[str], *, flavour: Flavour, ranks: int, cores: int, mpirun: str, interpreter: str
) -> list[str]:
    """The argv that runs `interpreter *worker` as `ranks` ranks on a node of `cores` cores."""
    return [mpirun, "-n", str(ranks), *_placement(flavour, ranks, cores), interpreter, *worker]


def _placement(flavour: Flavour, ranks: int, cores: int) -> list[str]:
    if flavour is Flavour.mpich:  # takes any number of ranks, binds none and hands its whole environment on
        return []
    # More ranks than cores are refused without the first; the second undoes the binding of a rank to one core.
    oversubscribe = ["--map-by", ":OVERSUBSCRIBE"] if ranks > cores else []
    return oversubscribe + (["--bind-to", "none"] if ranks < cores else [])


def environment(flavour: Flavour, user_id: int) -> dict[str, str]:
    """What mpirun needs in its environment: of Open MPI leave to run as root, where `user_id` is root."""
    if flavour is not Flavour.openmpi or user_id != 0:
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def flavour_of(mpirun: str) -> Flavour:
    """Whose mpirun this is, by what it says of its version.

    Raises:
        UsageError: it does not run, or is neither Open MPI's nor MPICH's.
    """
    command = [mpirun, "--version"]
    try:
        shown = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{mpirun} does not say its version: {error}") from None
    said = (shown.stdout + shown.stderr).decode(errors="replace")
    if "Open MPI" in said:
        return Flavour.openmpi
    if any(sign in said for sign in ("HYDRA", "Intel(R) MPI")):
        return Flavour.mpich
    first = (said.strip().splitlines() or ["nothing"])[0]
    raise UsageError(
        f"{mpirun} is neither Open MPI's nor MPICH's: its --version says {first!r}. Put the mpirun of mpi4py's MPI "
        "first on PATH, or start the job with torchrun"
    )


def find(interpreter: str, search_path: str | None) -> str:
    """The mpirun beside `interpreter` (where the wheels put it), else the first in `search_path`.

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
