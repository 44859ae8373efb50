"""Cores: who has which, who is pinned where, and that everything is given back."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.distributed as dist
from torch import Tensor, nn

import ddp
from ddp.job import Job
from ddp.transport.binding import Machine, bind, core_order, cores_to_pin_to, has_core_to_spare, look_around, share_out
from ranks import RankPool, process_group, run_ranks
from test_attach import DECLARED, batch, loss_of, make_model
from training_runs import Misbehaving, job, train_one

ALL = frozenset(range(8))


def machine(*cores: set[int] | frozenset[int], place: int = 0, bound: bool = False) -> Machine:
    return Machine(tuple(frozenset(each) for each in cores), place, bound)


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        ([0, 1], 1, [{0, 1}]),
        ([0, 1], 2, [{0}, {1}]),
        ([4, 0, 9, 2, 7], 2, [{4, 0}, {9, 2, 7}]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, [{0, 1}, {2, 3, 4}, {5, 6, 7}]),
        ([5, 6], 3, [{5}, {6}, {5}]),
    ],
)
def test_shares_are_contiguous_and_equal_but_for_one(cores: list[int], ranks: int, shares: list[set[int]]) -> None:
    assert share_out(cores, ranks) == shares


@pytest.mark.parametrize(
    ("choice", "here", "cores"),
    [
        ("auto", machine(ALL, ALL, place=1), {4, 5, 6, 7}),
        ("auto", machine(ALL, ALL, ALL, ALL, place=2), {4, 5}),
        ("auto", machine(ALL), None),  # it has them all to itself
        ("auto", machine({3}, {3}), None),  # more ranks than cores
        ("auto", machine(ALL, ALL, bound=True), None),  # by mpirun, to one socket
        ("auto", machine({0}, {1}), None),  # by mpirun, to a core each
        (False, machine(ALL, ALL), None),
        (True, machine({0, 1}, {0, 1}, bound=True), {0}),
        (True, machine({0, 1}, {2, 3}, place=1), None),  # as it is already
        (True, machine({0, 1}, {1, 2, 3}, place=1), {2, 3}),
        (True, machine({5, 6}, {5, 6}, {5, 6}, place=2), {5}),
    ],
)
def test_who_is_pinned_where(choice: Any, here: Machine, cores: set[int] | None) -> None:
    assert cores_to_pin_to(choice, here, {}) == cores


def test_the_threads_of_a_core_stay_together() -> None:
    order = {number: (0, number % 4, number) for number in ALL}  # 0 and 4 are two threads of one core
    assert [cores_to_pin_to("auto", machine(ALL, ALL, place=place), order) for place in (0, 1)] == [
        {0, 4, 1, 5},
        {2, 6, 3, 7},
    ]


@pytest.mark.parametrize(
    ("here", "threads", "started", "spare"),
    [
        (machine(ALL, ALL), 4, 1, False),  # all cores compute
        (machine(ALL, ALL), 3, 1, True),
        (machine(ALL, ALL), 3, 4, False),  # a group of 2 of the node's 4 ranks
        (machine(ALL, ALL), 1, 4, True),
        (machine({0}, {1}), 1, 2, False),  # bound to a core each
        (machine({0, 1}, {2, 3}), 1, 2, True),
        (machine({0, 1, 2}, {2, 3}), 2, 2, False),  # two and a half
        (machine({0, 1}), 1, 1, True),
    ],
)
def test_a_core_to_spare(here: Machine, threads: int, started: int, spare: bool) -> None:
    assert has_core_to_spare(here, threads, started) is spare


def test_cores_in_the_order_of_the_machine(tmp_path: Path) -> None:
    for number, socket, core in ((0, 1, 0), (10, 0, 3), (2, 0, 2)):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{socket}\n")
        (folder / "core_id").write_text(f"{core}\n")
    (tmp_path / "cpufreq").mkdir()
    assert sorted(core_order(tmp_path).items(), key=lambda item: item[1]) == [
        (2, (0, 2, 2)),
        (10, (0, 3, 10)),
        (0, (1, 0, 0)),
    ]
    assert core_order(tmp_path / "elsewhere") == {}


def _affinities() -> dict[int, set[int]]:
    return {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}


@contextmanager
def _another_thread() -> Iterator[int]:
    ready, end = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        end.wait(30)

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait(30)
    try:
        assert thread.native_id is not None
        yield thread.native_id
    finally:
        end.set()
        thread.join()


def test_all_threads_are_bound_and_given_back() -> None:
    before = _affinities()
    core = min(os.sched_getaffinity(0))
    with _another_thread() as old:
        held = bind(frozenset({core}))
        try:
            with _another_thread() as new:
                during = _affinities()
                assert {frozenset(each) for each in during.values()} == {frozenset({core})}
                assert {old, new} <= during.keys()
                child = subprocess.run(
                    [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=True,
                )
                assert child.stdout.strip() == f"[{core}]"
                held.release()
                assert _affinities()[new] == before[os.getpid()]
        finally:
            held.release()
        assert _affinities()[old] == before[os.getpid()]
    assert {thread: cores for thread, cores in _affinities().items() if thread in before} == before


def test_a_refusal_of_the_kernel_is_said_once_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = _affinities()
    with caplog.at_level(logging.WARNING, "ddp.transport"):
        held = bind(frozenset({4000}))  # no such core
    assert held.cores is None
    assert [record.message for record in caplog.records] == [
        "ranks stay unpinned: the kernel refuses (Invalid argument)"
    ]
    assert _affinities() == before


def _look(rank: int, world_size: int, store: str) -> tuple[Machine, float]:
    with process_group(rank, world_size, store):
        seen = look_around(None)
        dist.barrier()
    return seen, seen.share()


def test_ranks_see_each_others_cores(rank_pool: RankPool) -> None:
    mine = frozenset(os.sched_getaffinity(0))
    for rank, (seen, share) in enumerate(rank_pool.run(3, _look)):
        assert seen == Machine((mine,) * 3, rank, bound=False)
        assert share == pytest.approx(len(mine) / 3)


def _look_bound(rank: int, world_size: int, store: str) -> Machine:
    if rank == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return _look(rank, world_size, store)[0]


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@needs_two_cores
def test_a_rank_that_something_else_has_bound_is_noticed_by_all() -> None:
    mine = frozenset(os.sched_getaffinity(0))
    for rank, seen in enumerate(run_ranks(2, _look_bound)):
        assert seen == Machine((mine, frozenset({max(mine)})), rank, bound=True)


def _attached(rank: int, world_size: int, store: str, choice: Any) -> tuple[set[int], set[int], set[int], set[int]]:
    with process_group(rank, world_size, store):
        before = os.sched_getaffinity(0)
        model = make_model()
        meter = ddp.attach(model, batch_size=DECLARED, pin=choice, overlap=True)
        during = os.sched_getaffinity(0)
        (lane,) = (thread.native_id for thread in threading.enumerate() if thread.name == "ddp-shared_memory")
        assert lane is not None
        of_lane = os.sched_getaffinity(lane)
        loss_of(model, batch(rank, 0, DECLARED)).backward()
        dist.barrier()
        meter.close()
    return before, during, of_lane, os.sched_getaffinity(0)


@needs_two_cores
@pytest.mark.parametrize("choice", [False, True, "auto"])
def test_attach_pins_where_it_is_asked_to(rank_pool: RankPool, choice: Any) -> None:
    mine = os.sched_getaffinity(0)
    order = core_order()
    shares = share_out(sorted(mine, key=lambda core: order.get(core, (core,))), 2)
    for rank, (before, during, of_lane, after) in enumerate(rank_pool.run(2, _attached, choice)):
        assert before == after == mine
        assert during == of_lane == (shares[rank] if choice else mine)


class Watched(Misbehaving):
    """Notes the cores of the training thread in each forward."""

    seen: ClassVar[set[frozenset[int]]] = set()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        Watched.seen.add(frozenset(os.sched_getaffinity(0)))
        return super().loss(model, batch)


def _trained(rank: int, world_size: int, store: str, here: Job) -> tuple[str, set[frozenset[int]], set[int]]:
    import test_binding  # the task's class is that of the module's name, whatever pickle made of it

    test_binding.Watched.seen.clear()
    ended = train_one(rank, world_size, store, [here] * world_size, None)
    return ended.message, test_binding.Watched.seen, os.sched_getaffinity(0)


@needs_two_cores
@pytest.mark.parametrize(
    ("settings", "ranks", "pinned"),
    [({}, 2, True), ({"transport__pin": False}, 2, False), ({}, 3, len(os.sched_getaffinity(0)) >= 3)],
    ids=["auto", "off", "three"],
)
def test_a_run_pins_its_ranks_to_its_end(
    rank_pool: RankPool, tmp_path: Path, settings: dict[str, Any], ranks: int, pinned: bool
) -> None:
    mine = os.sched_getaffinity(0)
    order = core_order()
    shares = share_out(sorted(mine, key=lambda core: order.get(core, (core,))), ranks)
    here = job(tmp_path, task__name="test_binding:Watched", run__steps=2, **settings)
    for rank, (message, seen, after) in enumerate(rank_pool.run(ranks, _trained, here)):
        assert message == ""
        assert seen == {shares[rank] if pinned else frozenset(mine)}
        assert after == mine
