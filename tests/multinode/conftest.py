"""Nodes for the tests of this folder, and the jobs that run on them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster import Cluster, refusal


@pytest.fixture(scope="session")
def may_have_nodes() -> None:
    """Skip, or with CI=true fail, where this machine refuses nodes."""
    if (reason := refusal()) is not None:
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


@pytest.fixture(scope="session")
def two_nodes(may_have_nodes: None) -> Iterator[Cluster]:
    """Two nodes for the session. A test that breaks its nodes makes its own."""
    with Cluster(nodes=2) as cluster:
        yield cluster
