"""A rank that is slow by itself is named, and chance names hardly any: simulated times, and real ranks."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ddp.telemetry.recording import open_recording, read_events
from ddp.training.straggler import CONFIRMATIONS, JUDGED_EVERY_STEPS, WINDOW_STEPS, StragglerWatch, straggler_event
from ranks import RankPool
from training_runs import job, steps_of, train_ranks

SOON = WINDOW_STEPS + CONFIRMATIONS * JUDGED_EVERY_STEPS  # steps by which what is clear is known


def own_times(source: np.random.Generator, steps: int, ranks: int, sigma: float) -> NDArray[np.float64]:
    """20 ms with log-normal noise; two in a hundred take up to ten times as long, and the first ones compile."""
    times = 0.02 * source.lognormal(0.0, sigma, (steps, ranks))
    times *= np.where(source.random((steps, ranks)) < 0.02, source.uniform(2.0, 10.0, (steps, ranks)), 1.0)
    times[:3] *= source.uniform(5.0, 50.0, (3, ranks))
    return times


def named(times: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Each change of the named rank, with its step."""
    watch, changes = StragglerWatch(times.shape[1]), []
    for step, row in enumerate(times.tolist(), 1):
        before = watch.rank
        news = watch.observe(row)
        assert (news is not None) == (watch.rank != before)
        if news is not None:
            changes.append((step, watch.rank))
    return changes


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize(("sigma", "most"), [(0.1, 0), (0.2, 0), (0.3, 1), (0.5, 6)])
def test_false_alarms_in_20_000_steps(ranks: int, sigma: float, most: int) -> None:
    """None while times vary by up to 20 %; a handful where they vary by half."""
    source = np.random.default_rng([ranks, round(100 * sigma)])
    runs = [named(own_times(source, 2_000, ranks, sigma)) for _ in range(10)]
    alarms = sum(rank >= 0 for changes in runs for _, rank in changes)
    assert alarms <= most


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize(
    ("sigma", "slowdown", "share"),
    [(0.1, 1.4, 1.0), (0.1, 2.0, 1.0), (0.3, 1.5, 0.9), (0.3, 2.0, 1.0), (0.5, 1.5, 0.3), (0.5, 3.0, 1.0)],
)
def test_detection_within_300_steps(ranks: int, sigma: float, slowdown: float, share: float) -> None:
    source, found = np.random.default_rng([ranks, round(100 * sigma), round(10 * slowdown)]), 0
    for run in range(20):
        slow, times = run % ranks, own_times(source, 300, ranks, sigma)
        times[:, slow] *= slowdown
        changes = named(times)
        assert {rank for _, rank in changes} <= {slow, -1}
        found += bool(changes)
    assert found >= share * 20


def test_what_is_clear_is_known_soon_and_said_with_its_times() -> None:
    times = np.full((SOON, 3), 0.081)
    times[:, 1] = 0.133
    watch = StragglerWatch(3)
    news = [(step, told) for step, row in enumerate(times.tolist(), 1) if (told := watch.observe(row)) is not None]
    ((step, told),) = news
    assert step <= SOON
    assert watch.slowdown_ratio == pytest.approx(0.133 / 0.081)
    event = straggler_event(watch, told, 77, 5.0)
    assert (event.step, event.unix_time, event.kind, event.rank) == (77, 5.0, "straggler", 1)
    assert event.text == "rank 1 takes 133 ms to its last gradient where the others take 81"


def test_it_is_let_go_again_and_not_at_the_first_good_step() -> None:
    source = np.random.default_rng(5)
    times = own_times(source, 400, 4, 0.1)
    times[:200, 2] *= 2.0
    (_, slow), (step, nobody) = named(times)
    assert (slow, nobody) == (2, -1)
    assert 210 < step <= 200 + SOON
    watch = StragglerWatch(2)
    for seconds in (0.2, 0.1):
        told = [news for _ in range(SOON) if (news := watch.observe([0.1, seconds])) is not None]
    event = straggler_event(watch, told[-1], 90, 5.0)
    assert (event.kind, event.rank) == ("straggler_over", 1)
    assert "rank 1 takes 100 ms" in event.text


def test_a_name_once_given_lasts_below_the_line_where_it_is_given() -> None:
    """A rank at 1.2 times the others' time is not named, and stays named where it was slower before."""
    assert named(np.tile([0.1, 0.12], (200, 1))) == []
    assert len(named(np.concatenate([np.tile([0.1, 0.13], (SOON, 1)), np.tile([0.1, 0.12], (200, 1))]))) == 1


@pytest.mark.parametrize(
    ("times", "why"),
    [
        (np.tile([0.0010, 0.0025], (200, 1)), "less than 2 ms are not worth a word"),
        (np.tile([0.1, 0.1], (200, 1)), "nobody is slow"),
        (np.tile([0.1], (200, 1)), "one rank has no others"),
        (np.where(np.arange(200)[:, None] % 3 == 0, [0.1, 0.9], [0.1, 0.1]), "one slow step in three is no habit"),
        (np.zeros((200, 2)), "nothing was measured"),
        (np.where((np.arange(200)[:, None] // 20) % 2 == 0, [0.1, 0.2], [0.2, 0.1]), "they take turns"),
    ],
)
def test_nobody_is_named(times: NDArray[np.float64], why: str) -> None:
    assert named(times) == [], why


def test_nothing_is_known_before_a_window_is_full() -> None:
    watch = StragglerWatch(2)
    for _ in range(WINDOW_STEPS - 1):
        watch.observe([0.1, 0.2])
    assert math.isnan(watch.slowdown_ratio)


@pytest.mark.parametrize(("world_size", "slow_rank"), [(2, 1), (3, 0)])
def test_a_rank_that_sleeps_is_named_in_a_run(
    rank_pool: RankPool, tmp_path: Path, world_size: int, slow_rank: int
) -> None:
    options = {"action": "slow", "rank": slow_rank}
    here = job(tmp_path, run__steps=SOON + 8, task__options=options, evaluation__every_steps=1_000)
    assert {ended.kind for ended in train_ranks(rank_pool, world_size, here)} == {""}
    steps = steps_of(tmp_path / "run")
    with closing(open_recording(tmp_path / "run" / "run.db")) as database:
        (event,) = [event for event in read_events(database) if event.kind.startswith("straggler")]
    assert (event.kind, event.rank) == ("straggler", slow_rank)
    assert event.text.startswith(f"rank {slow_rank} takes ")
    assert {step.straggler_rank for step in steps[event.step - 1 :]} == {slow_rank}
    assert {step.straggler_rank for step in steps[: event.step - 1]} == {-1}
    assert steps[-1].slowdown_ratio > 1.25
