"""What a run takes of its machine, as far as it can be told without a group of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from ddp.errors import UsageError
from ddp.job import TransportSection
from ddp.topology import Launcher, Topology
from ddp.training.resources import choose_device, refuse_worlds_of_one


@pytest.mark.parametrize(
    ("name", "launcher", "refused"),
    [
        ("mpi", "torchrun", True),
        ("mpi", "openmpi", False),
        ("mpi", "pmi", False),
        ("auto", "torchrun", False),
        ("hierarchical", "torchrun", False),
    ],
)
def test_mpi_without_mpirun_is_refused(name: Any, launcher: Launcher, refused: bool) -> None:
    topology = Topology(0, 2, 0, 2, launcher=launcher)
    if not refused:
        refuse_worlds_of_one(TransportSection(name=name), topology)
        return
    with pytest.raises(UsageError, match=r"^transport.name: .*every process would be its own world.*mpirun"):
        refuse_worlds_of_one(TransportSection(name=name), topology)


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu", Topology(0, 1, 0, 1)).type == "cpu"
