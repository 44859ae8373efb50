"""Messages between single ranks over gloo and over both MPIs: order, sizes, deadlines, departures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from ddp.errors import PeerLostError, UsageError
from ddp.transport.mailbox import C10dMailbox, Mailbox, MpiMailbox
from ddp.transport.nodes import nodes, places
from mpi_environments import MpiEnvironment
from mpi_ranks import run_under_mpi
from ranks import RankPool, process_group, run_ranks

SIZES = (1, 4096, 100_000, 3_000_000)


def send_around(mailbox: Mailbox) -> list[bool]:
    """Every rank sends every other one messages of all sizes with two tags at once; whether each came whole, in order."""
    rank, peers = mailbox.rank, [peer for peer in range(mailbox.world_size) if peer != mailbox.rank]
    spaces = {(peer, size, tag): np.zeros(size + 5, np.uint8) for peer in peers for size in SIZES for tag in (0, 1)}
    receives = [(key[0], mailbox.post_receive(key[0], space, key[2])) for key, space in spaces.items()]
    sends = []
    for peer in peers:
        for tag in (1, 0):  # not the order in which they are received
            for size in SIZES:
                message = np.full(size, 10 * rank + tag + 1, np.uint8)
                message[-1] = size % 251
                sends.append((peer, mailbox.post_send(peer, message, tag), message))
    for peer, handle in receives:
        mailbox.wait(peer, handle)
    for peer, handle, _ in sends:
        mailbox.wait(peer, handle)
    return [
        bool((space[: size - 1] == 10 * peer + tag + 1).all() and space[size - 1] == size % 251)
        and not space[size:].any()
        for (peer, size, tag), space in spaces.items()
    ]


def _over_gloo(rank: int, world_size: int, store: str) -> tuple[list[bool], list[int]]:
    with process_group(rank, world_size, store):
        mailbox = C10dMailbox(None, 20.0)
        arrived = send_around(mailbox)
        dist.barrier()
        mailbox.close(failed=False)
        return arrived, mailbox.sent_bytes


def test_messages_over_gloo(rank_pool: RankPool) -> None:
    for rank, (arrived, sent) in enumerate(rank_pool.run(3, _over_gloo)):
        assert all(arrived) and len(arrived) == 2 * 2 * len(SIZES)
        assert sent == [0 if peer == rank else 2 * sum(SIZES) for peer in range(3)]


def _late_over_gloo(rank: int, world_size: int, store: str) -> str:
    with process_group(rank, world_size, store):
        mailbox = C10dMailbox(None, 0.6)
        if rank == 1:
            time.sleep(1.5)
            return ""
        mailbox.subject = "five elements"
        try:
            mailbox.wait(1, mailbox.post_receive(1, np.zeros(5, np.uint8), 0))
        except PeerLostError as error:
            return str(error)
        return "no error"


def test_a_late_rank_is_named_over_gloo() -> None:
    said = run_ranks(3, _late_over_gloo)
    for rank in (0, 2):
        assert said[rank].startswith("rank 1 (pid "), said
        assert f"did not bring five elements within 0.6 s (transport.timeout_seconds) to rank {rank}" in said[rank]


def _without_mpirun(rank: int, world_size: int, store: str) -> str:
    with process_group(rank, world_size, store):
        try:
            MpiMailbox(None, 5.0)
        except UsageError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("under", ["torchrun", "no mpirun"])
def test_mpi_is_refused_where_every_process_would_be_its_own_world(under: str) -> None:
    local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment = {**local, "RANK": "0", "LOCAL_RANK": "0"} if under == "torchrun" else {}
    for said in run_ranks(2, _without_mpirun, environment=environment):
        assert f"under {under}" in said and "own world" in said and "mpirun" in said


def over_mpi(rank: int, world_size: int) -> dict[str, Any]:
    """All that one launch can show."""
    seen: dict[str, Any] = {}
    mailbox = MpiMailbox(None, 20.0)
    seen["arrived"] = send_around(mailbox)
    seen["places"] = [str(place) for place in mailbox.places]
    mailbox.close(failed=False)
    for failed in (False, True):
        seen[f"gone {failed}"] = _departure(MpiMailbox(None, 20.0), failed)
    seen["late"] = _lateness(MpiMailbox(None, 0.6))
    dist.barrier()
    odd: Any = dist.new_group([1, 3], use_local_synchronization=True) if rank in (1, 3) else None
    if odd is not None:
        subgroup = MpiMailbox(odd, 20.0)
        seen["subgroup"] = send_around(subgroup)
        subgroup.close(failed=False)
    return seen


def _departure(mailbox: Mailbox, failed: bool) -> str:
    """Rank 1 sends rank 0 one message and goes; rank 0 waits for two."""
    said = ""
    if mailbox.rank == 0:
        spaces = np.zeros((2, 100), np.uint8)
        handles = [mailbox.post_receive(1, space, 0) for space in spaces]
        mailbox.wait(1, handles[0])  # what came before the goodbye counts
        assert spaces[0].all()
        began = time.monotonic()
        try:
            mailbox.wait(1, handles[1])
        except PeerLostError as error:
            said = str(error) if time.monotonic() - began < 5 else "late"
    elif mailbox.rank == 1:
        mailbox.wait(0, mailbox.post_send(0, np.ones(100, np.uint8), 0))
        mailbox.close(failed=failed)
    dist.barrier()
    mailbox.close(failed=True)
    return said


def _lateness(mailbox: Mailbox) -> str:
    said = ""
    if mailbox.rank != 2:
        try:
            mailbox.wait(2, mailbox.post_receive(2, np.zeros(5, np.uint8), 0))
        except PeerLostError as error:
            said = str(error)
    dist.barrier()
    mailbox.close(failed=True)
    return said


def test_messages_over_mpi(mpi: MpiEnvironment, tmp_path: Path) -> None:
    by_rank = run_under_mpi(mpi, 4, over_mpi, tmp_path)
    for rank, seen in enumerate(by_rank):
        assert all(seen["arrived"]) and len(seen["arrived"]) == 3 * 2 * len(SIZES)
        assert [place.startswith(f"rank {peer} (pid ") for peer, place in enumerate(seen["places"])] == [True] * 4
        if rank != 2:
            assert seen["late"].startswith("rank 2 (pid "), seen
            assert "did not bring a message within 0.6 s" in seen["late"]
        if rank in (1, 3):
            assert seen["subgroup"] == [True] * 2 * len(SIZES)
    assert " left while rank 0 waited" in by_rank[0]["gone False"], by_rank[0]
    assert " failed while rank 0 waited" in by_rank[0]["gone True"], by_rank[0]
    assert by_rank[0]["gone True"].startswith("rank 1 (pid ")


def _where(rank: int, world_size: int, store: str) -> tuple[list[list[int]], list[int]]:
    with process_group(rank, world_size, store):
        return nodes(None), [place.rank for place in places(None)]


def test_processes_of_one_machine_are_one_node(rank_pool: RankPool) -> None:
    assert rank_pool.run(3, _where) == [([[0, 1, 2]], [0, 1, 2])] * 3
