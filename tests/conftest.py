"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Processes that stay for the session; see ranks.py for how to use them."""
    with RankPool() as pool:
        yield pool
