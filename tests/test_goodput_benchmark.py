"""What benchmarks/goodput.py concludes from the moments of a run, against runs that are made up or simulated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from faults.kill_now_and_then import BATCH, EXAMPLES, STEPS_PER_EPOCH, Step, expect_each_once, expected_ratio, read_log
from faults.save_stall import of_moments
from faults.verdict import UnexpectedError


def two_logs(epochs: int) -> list[list[Step]]:
    """Two ranks that share out each batch of a shuffled epoch, the larger part to the second."""
    logs: list[list[Step]] = [[], []]
    for epoch in range(epochs):
        order = random.Random(epoch).sample(range(EXAMPLES), EXAMPLES)
        for index in range(STEPS_PER_EPOCH):
            batch = order[index * BATCH : (index + 1) * BATCH]
            for log, part in zip(logs, (batch[: len(batch) // 2], batch[len(batch) // 2 :]), strict=True):
                log.append(Step(1, epoch * STEPS_PER_EPOCH + index + 1, float(index), tuple(part)))
    return logs


def test_steps_that_were_lost_do_not_count() -> None:
    logs = two_logs(3)
    for log in logs:  # killed after step 7, resumed after step 4: other examples before than after would show
        log[7:7] = [Step(2, each.step, each.unix_time, each.examples) for each in log[4:7]]
        log[4:7] = [Step(1, each.step, each.unix_time, (0, 0, 0)) for each in log[4:7]]
    expect_each_once(logs, 3)


def test_an_example_that_is_used_again_or_missed_is_found() -> None:
    logs = two_logs(2)
    spoilt = logs[1][5]
    logs[1][5] = Step(1, spoilt.step, 0.0, (*spoilt.examples[1:], spoilt.examples[1]))
    with pytest.raises(UnexpectedError, match=r"epoch 1: 1 examples were missed, 1 used again"):
        expect_each_once(logs, 2)


def test_a_step_that_a_rank_never_took_is_found() -> None:
    logs = two_logs(1)
    del logs[0][2]
    with pytest.raises(UnexpectedError, match="a rank never took step 3"):
        expect_each_once(logs, 1)


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(json.dumps([7, 3, 1.5, [4, 2]]) + "\n")
    assert read_log(tmp_path / "log") == [Step(7, 3, 1.5, (4, 2))]
    assert read_log(tmp_path / "none") == []


@pytest.mark.parametrize("mean, restart, interval, stall", [(60.0, 7.0, 5.0, 0.1), (10.0, 4.0, 8.0, 1.0)])
def test_the_ratio_of_a_long_run_is_that_of_one_simulated(
    mean: float, restart: float, interval: float, stall: float
) -> None:
    generator = random.Random(1)
    kept = total = 0.0
    for _ in range(200_000):
        up = generator.expovariate(1 / mean)
        kept += up // (interval + stall) * interval
        total += up + restart
    parts = {"restart_seconds": restart, "interval_seconds": interval, "stall_seconds": stall}
    assert expected_ratio(mean, **parts) == pytest.approx(kept / total, rel=0.01)


def test_the_stall_is_what_steps_take_longer_after_a_save() -> None:
    gaps = [1.0] * 59
    for save in (10, 20, 30, 40, 50):
        gaps[save - 1] += 0.5  # the step after it
        gaps[save] += 0.25  # and the next, while it is written
    moments = [sum(gaps[:count]) for count in range(60)]
    stall = of_moments(moments, 10)
    assert stall.step_seconds == pytest.approx(1.0)
    assert stall.first_seconds == pytest.approx(0.5)
    assert stall.interval_seconds == pytest.approx(0.75)
    assert stall.share == pytest.approx(0.075)
