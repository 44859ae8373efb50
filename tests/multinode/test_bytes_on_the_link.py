"""What transports say they sent is what the link between the nodes carried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from count_bytes import CALLS, ELEMENTS
from launching import finish, mpirun, ranks_one_by_one

from cluster import Cluster
from mpi_environments import mpi_environment

PROGRAM = str(Path(__file__).with_name("count_bytes.py"))
BUCKETS_BYTES = 4 * ELEMENTS * CALLS
HEADERS = 0.06  # and acknowledgements, at most

# Bytes that leave a node, over those of the buckets: in a flat ring of four ranks one rank's 2 (4 - 1) / 4 cross
# the link; reduced inside the node first, once the buckets or what they are rounded to; each rank with each other
# rank, as mpi, what both ranks send to both of the other node.
EXPECTED = {
    "c10d:gradient": ("c10d", 1.5),
    "auto:gradient": ("hierarchical", 1.0),
    "hierarchical:bfloat16": ("hierarchical", 0.5),
    "hierarchical:int8": ("hierarchical", 0.25),
    "mpi:gradient": ("mpi", 2.0),
    "mpi:bfloat16": ("mpi", 1.0),
}


@pytest.fixture(scope="module")
def counted(two_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = [PROGRAM, *EXPECTED, "shared_memory:gradient"]
    ended = mpirun(two_nodes, mpi_environment("openmpi"), 2, arguments, tmp_path_factory.mktemp("bytes"))
    assert ended.code == 0, ended
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("transport", EXPECTED)
def test_the_link_carries_what_the_algorithm_sends(counted: dict[str, Any], transport: str) -> None:
    name, expected = EXPECTED[transport]
    found, *ranks = counted[transport]
    assert found == name
    for sent, _ in (ranks[0], ranks[2]):  # ranks fill one node after the other
        assert 1.0 <= sent / (expected * BUCKETS_BYTES) <= 1.0 + HEADERS


@pytest.mark.parametrize("transport", [each for each in EXPECTED if not each.startswith("c10d")])
def test_a_transport_counts_what_the_link_carries(counted: dict[str, Any], transport: str) -> None:
    ranks = counted[transport][1:]
    for node in (ranks[:2], ranks[2:]):
        own_count = sum(own for _, own in node)
        assert node[0][0] == pytest.approx(own_count, rel=HEADERS)
        assert own_count < node[0][0], "headers come on top"


def test_it_does_so_without_mpi(two_nodes: Cluster, tmp_path: Path) -> None:
    with ranks_one_by_one(two_nodes, 2, [PROGRAM, "auto:gradient"], tmp_path) as ranks:
        ended = finish(ranks)
    assert [each.code for each in ended] == [0] * 4, ended
    found, *counts = json.loads(ended[0].stdout.splitlines()[-1])["auto:gradient"]
    assert found == "hierarchical"
    for node in (counts[:2], counts[2:]):
        assert node[0][0] == pytest.approx(sum(own for _, own in node), rel=HEADERS)
        assert node[0][0] == pytest.approx(BUCKETS_BYTES, rel=HEADERS)


def test_nodes_do_not_share_memory(counted: dict[str, Any]) -> None:
    assert "cannot map each other's memory" in counted["shared_memory:gradient"]
