"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpi_environments import MPI_NAMES, MpiEnvironment, mpi_environment
from ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Processes that stay for the session; see ranks.py for how to use them."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(params=MPI_NAMES)
def mpi(request: pytest.FixtureRequest) -> MpiEnvironment:
    """Each MPI in turn; see mpi_environments.py."""
    return mpi_environment(request.param)
