"""A node that falls silent: the ranks of the others notice, say so and end, each on its own."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from launching import finish, ranks_one_by_one

from cluster import Cluster
from ddp import outcome
from jobs import Ended, wait_until
from training_runs import job

TIMEOUT_SECONDS = 4.0
NOTICE_SECONDS = 5.0  # after the timeout, to find out and to say so
END_SECONDS = 20.0  # to take an interpreter down where other work keeps the cores busy


def cut_off(folder: Path, transport: str) -> list[Ended]:
    """Four ranks that train on two nodes, the second of which is unplugged in the middle of it."""
    started = folder / "started"
    endless = job(
        folder,
        run__steps=100_000,
        task__name="multinode.wide_regression:Task",
        task__options={"file": str(started), "step": 10, "seconds": 0.02},
        transport__timeout_seconds=TIMEOUT_SECONDS,
        transport__name=transport,
    )
    (folder / "job.toml").write_text(endless.to_toml())
    arguments = ["-m", "ddp", "train", "job.toml", "--allow-import", "multinode.wide_regression"]
    with Cluster(nodes=2) as cluster, ranks_one_by_one(cluster, 2, arguments, folder) as ranks:
        wait_until(lambda: started.exists() or any(rank.poll() is not None for rank in ranks), 120)
        cluster.nodes[1].unplug()
        cut = time.time()
        ended = finish(ranks, TIMEOUT_SECONDS + NOTICE_SECONDS + END_SECONDS)
    assert (folder / "run" / outcome.FILE_NAME).stat().st_mtime - cut < TIMEOUT_SECONDS + NOTICE_SECONDS
    return ended


SAYS = {
    "c10d": r"rank \d lost another rank in c10d: .*Timed out waiting 4000ms",
    "hierarchical": r"rank (\d)(?: \(pid \d+, host node[01]\))? (?:did not bring .* within 4 s|was lost .*)",
}


@pytest.mark.parametrize("transport", SAYS)
def test_ranks_of_both_nodes_end_when_the_link_is_cut(may_have_nodes: None, tmp_path: Path, transport: str) -> None:
    ended = cut_off(tmp_path, transport)
    assert [each.code for each in ended] == [1] * 4, ended
    causes = re.findall(r"^error: rank \d on node[01].*", "".join(each.stderr for each in ended), re.MULTILINE)
    assert causes, ended
    said = [re.search(SAYS[transport], cause) for cause in causes]
    assert all(said), causes
    if transport == "hierarchical":  # who is missing is on the other node: ranks 0 and 1 are node 0's
        for cause, match in zip(causes, said, strict=True):
            assert match is not None and f"on node{int(match[1]) // 2}," not in cause.split(match[0])[0], causes
