"""The roll call between nodes, over a store of this process."""

from __future__ import annotations

import torch.distributed as dist

from ddp.board import DIED, Position
from ddp.roll_call import RemoteCall, Told
from jobs import wait_until


def test_ranks_of_other_nodes_come_and_tell() -> None:
    store = dist.HashStore()
    first, second = RemoteCall(store, 0, (1, 2)), RemoteCall(store, 1, (0,))
    first.begin()
    second.begin()
    wait_until(lambda: first.missing() == [2] and not second.missing(), 3)
    assert first.told() is None and not first.has_failed()
    found = Told(3, DIED, Position("forward", 7))
    second.report(found)
    wait_until(lambda: first.told() == found, 3)
    second.say_failed()
    wait_until(first.has_failed, 3)
    wait_until(first.is_over, 5)


def test_a_store_that_is_gone_is_said() -> None:
    class Gone(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    call = RemoteCall(Gone(), 0, (1,))
    call.begin()
    wait_until(lambda: call.is_unreachable, 3)
    assert call.missing() == [1]


def test_alone_on_a_node_of_one_there_is_nobody_to_ask() -> None:
    call = RemoteCall(dist.HashStore(), 0, ())
    call.begin()
    assert call.missing() == [] and not call.is_unreachable
