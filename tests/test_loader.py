"""Micro-batches fetched by processes: the same ones, in the same order, whatever the plan does; and how workers end."""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddp.errors import DdpError, LoaderError, UsageError
from ddp.job import DataSection
from ddp.tasks.base import TensorExamples
from ddp.training.course import Course
from ddp.training.data import BatchPlan, StepData
from ddp.training.loader import Loader
from ddp.training.random_state import random_state
from jobs import is_running, wait_until
from ranks import run_ranks
from training_runs import differences, job

PLAN = BatchPlan(examples=61, global_batch_size=12, micro_batch_size=5, world_size=1, seed=3)


class Doing(Dataset[Any]):
    """Examples that are their numbers, and what happens when example 40 is fetched."""

    def __init__(self, action: Callable[[], object] = lambda: None) -> None:
        self.action = action

    def __len__(self) -> int:
        return PLAN.examples

    def __getitem__(self, index: int) -> Tensor:
        if index == 40:
            self.action()
        return torch.tensor(index)


class Augmented(Doing):
    """A draw from each generator is added, and which process it was."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        value = index + random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(1).item()
        return torch.tensor(value, dtype=torch.float64), torch.tensor(os.getpid())


@contextmanager
def loading(dataset: Dataset[Any], workers: int = 2, prefetch: int = 2, plan: BatchPlan = PLAN) -> Iterator[Loader]:
    loader = Loader(DataSection(workers=workers, prefetch=prefetch), rank=0)
    try:
        loader.start(dataset, plan, None)
        yield loader
    finally:
        loader.close()
        assert not any(is_running(worker.process_id) for worker in loader.workers)


def course_of(job_folder: Path, plan: BatchPlan = PLAN) -> Course:
    from ddp.training.course import begin_course

    return begin_course(job(job_folder), plan)


def take(course: Course, steps: Iterator[StepData], count: int) -> list[list[Any]]:
    """The micro-batches of so many steps."""
    taken: list[list[Any]] = []
    for _ in range(count):
        data = next(steps)
        taken.append(list(data.micro_batches))
        assert sum(len(part if isinstance(part, Tensor) else part[0]) for part in data.micro_batches) == data.examples
        course.take(data)
    return taken


def numbers(taken: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[part.tolist() for part in step] for step in taken]


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 2), (3, 4)])
def test_the_same_micro_batches_as_in_process_and_the_ranks_generators_stay(
    tmp_path: Path, workers: int, prefetch: int
) -> None:
    """Three epochs whose last step is uneven; some steps in more parts; the plan changes twice, the run is set back once."""

    def least(ahead: int) -> int:
        return 4 if (calls[0] + ahead) % 3 == 0 else 1

    def run(loader: Loader | None) -> list[list[list[int]]]:
        course, calls[0] = course_of(tmp_path), 0
        steps = course.batches(Doing(), 0, least, loader)
        taken: list[list[Tensor]] = []
        for step in range(24):
            calls[0] = step
            if step in (7, 8, 15):
                course.plan = replace(course.plan, global_batch_size=8 + step, micro_batch_size=3 + step % 4)
            if step == 12:
                course.epoch, course.position = 0, 24
            taken += take(course, steps, 1)
        return numbers(taken)

    calls = [0]
    expected, before = run(None), random_state()
    with loading(Doing(), workers, prefetch) as loader:
        assert run(loader) == expected
    assert differences(random_state(), before) == []


def test_augmentation_depends_on_seed_epoch_and_position_alone(tmp_path: Path) -> None:
    """Whatever worker does it, however many there are, and wherever fetching began."""

    def run(workers: int, steps: int, epoch: int = 0, position: int = 0, seed: int = 3) -> list[list[Any]]:
        plan = replace(PLAN, seed=seed)
        course = course_of(tmp_path, plan)
        course.epoch, course.position = epoch, position
        with loading(Augmented(), workers, plan=plan) as loader:
            return take(course, course.batches(Augmented(), 0, loader=loader), steps)

    def values(taken: list[list[Any]]) -> list[list[list[float]]]:
        return [[part[0].tolist() for part in step] for step in taken]

    one, three = run(1, 9), run(3, 9)
    assert values(one) == values(three)
    assert len({int(pid) for step in three for part in step for pid in part[1]}) == 3
    assert values(run(2, 6, position=36)) == values(one)[3:]
    assert values(run(2, 3, epoch=1)) == values(one)[6:]
    drawn = {value - round(value) for step in values(one) for part in step for value in part}
    assert len(drawn) == sum(len(part) for step in values(one) for part in step)
    assert not drawn & {value - round(value) for step in values(run(1, 3, seed=4)) for part in step for value in part}


def refuse() -> None:
    raise UsageError("data: this set is for one rank only")


def share_too_much() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))


ENDINGS: list[tuple[Callable[[], object], type[DdpError], str]] = [
    (
        lambda: 1 / 0,
        LoaderError,
        r"worker \d \(pid \d+\) of rank 0 raised ZeroDivisionError: division by zero; .* fetched",
    ),
    (refuse, UsageError, "^data: this set is for one rank only$"),
    (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        LoaderError,
        r"worker \d \(pid \d+\) of rank 0 was killed by SIGKILL",
    ),
    (lambda: (faulthandler.disable(), os.abort()), LoaderError, "was ended by SIGABRT"),
    (lambda: os._exit(7), LoaderError, "ended with code 7: a data set must not end its process"),
    (lambda: sys.exit(3), LoaderError, "ended with code 3: a data set must not end its process"),
    (share_too_much, LoaderError, "raised OSError: .*File too large"),
]


@pytest.mark.parametrize(("action", "kind", "said"), ENDINGS, ids=lambda value: str(getattr(value, "__name__", "")))
def test_a_worker_that_fails_is_named_when_its_micro_batch_is_wanted(
    tmp_path: Path, action: Callable[[], object], kind: type[DdpError], said: str
) -> None:
    course = course_of(tmp_path)
    expected = take(course_of(tmp_path), course_of(tmp_path).batches(Doing(), 0), 1)
    with loading(Doing(action)) as loader:
        steps = course.batches(Doing(), 0, loader=loader)
        taken = []
        with pytest.raises(kind, match=said) as caught:
            for _ in range(6):
                taken += take(course, steps, 1)
        assert type(caught.value) is kind
    if (
        kind is UsageError or "raised Zero" in said
    ):  # what came before it was good; a dead worker takes what it had along
        assert 40 not in [number for step in numbers(taken) for part in step for number in part]
        assert numbers(taken[:1]) == numbers(expected)[: len(taken[:1])]


def test_what_a_data_set_gives_that_cannot_be_sent_is_said(tmp_path: Path) -> None:
    course = course_of(tmp_path)

    class Strange(Doing):
        @staticmethod
        def collate(examples: list[Tensor]) -> Any:
            return lambda: examples

    class Scattered(Strange):
        @staticmethod
        def collate(examples: list[Tensor]) -> Any:
            return examples[:1] * 0 + [torch.zeros(1) for _ in range(20_000)]

    for dataset, said in (
        (Strange(), "lambda"),
        (Scattered(), "a batch of 2000. tensors and arrays: let the data set's collate"),
    ):
        with loading(dataset) as loader, pytest.raises(LoaderError, match=said):
            next(course.batches(dataset, 0, loader=loader))


def test_workers_ignore_what_is_meant_for_the_rank_and_end_at_once(tmp_path: Path) -> None:
    """Also in the middle of a fetch that takes for ever; and they have one thread and the cores that they are given."""
    course = course_of(tmp_path)
    with loading(Doing(lambda: time.sleep(600))) as loader:
        steps = course.batches(Doing(), 0, loader=loader)
        take(course, steps, 1)
        for worker in loader.workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                os.kill(worker.process_id, number)
        epoch_order = PLAN.order(0).tolist()
        take(course, steps, epoch_order.index(40) // 12 - 1)
        assert all(is_running(worker.process_id) for worker in loader.workers)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 30  # not the 600 seconds


class Placed(Doing):
    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([torch.get_num_threads(), *sorted(os.sched_getaffinity(0))])


def test_a_worker_has_one_thread_and_the_cores_that_the_rank_had_before_it_was_pinned() -> None:
    cores = sorted(os.sched_getaffinity(0))
    loader = Loader(DataSection(workers=1), rank=0)
    try:
        os.sched_setaffinity(0, cores[:1])
        loader.start(Placed(), PLAN, cores)
        data = loader.step(PLAN, 0, 0, lambda ahead: 1)
        assert data.micro_batches[0][0].tolist() == [1, *cores]
    finally:
        os.sched_setaffinity(0, cores)
        loader.close()


def test_no_room_for_a_process_is_a_usage_error_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    forks = iter([False, True])
    fork = os.fork

    def refusing() -> int:
        if next(forks):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refusing)
    with (
        pytest.raises(UsageError, match="process 1 of 2 of rank 0 cannot be started: Resource temporarily"),
        loading(Doing()),
    ):
        pass


def leave_with_workers(rank: int, world_size: int, store_address: str, folder: str, how: str) -> None:
    """End in the middle of a fetch ahead, without closing anything."""
    loader = Loader(DataSection(workers=2), rank=rank)
    loader.start(TensorExamples(torch.arange(PLAN.examples)), PLAN, None)
    loader.step(PLAN, 0, 0, lambda ahead: 1)
    Path(folder, "pids").write_text(" ".join(str(worker.process_id) for worker in loader.workers))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(5)


@pytest.mark.parametrize("how", ["killed", "os._exit"])
def test_no_worker_outlives_its_rank(tmp_path: Path, how: str) -> None:
    with pytest.raises(AssertionError, match="ended with code"):
        run_ranks(1, leave_with_workers, str(tmp_path), how)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)), timeout=10)
