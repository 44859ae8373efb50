"""Fixtures that several test modules share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpi_environments import MPI_NAMES, MpiEnvironment, mpi_environment
from ranks import RankPool
from tracker_server import Server


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Processes that stay for the session; see ranks.py for how to use them."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(params=MPI_NAMES)
def mpi(request: pytest.FixtureRequest) -> MpiEnvironment:
    """Each MPI in turn; see mpi_environments.py."""
    return mpi_environment(request.param)


@pytest.fixture
def tracker_servers() -> Iterator[Callable[..., Server]]:
    """Makes servers, and closes them."""
    made: list[Server] = []

    def make(code: int | None = None) -> Server:
        made.append(Server(code))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(OSError):
            each.close()


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's account with a tracker is known, nor kept in a home directory."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
