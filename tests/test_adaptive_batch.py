"""The arithmetic behind the benchmark of adaptive batches, against closed forms and searches; and one run of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_analysis import Machine, Run, Way, affine_cost, collective_seconds, neighbours, way_of
from jobs import python, run_command

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "adaptive_batch.py"


def run_of(examples: list[float], loss: list[float], noise_scale: list[float] | None = None) -> Run:
    scales = [math.nan] * len(loss) if noise_scale is None else noise_scale
    return Run(np.array(examples), 0.5 * np.ones(len(loss)), np.array(loss), np.array(scales))


def test_the_loss_is_averaged_over_the_newest_steps_that_hold_enough_examples() -> None:
    run = run_of([4.0, 4.0, 8.0, 2.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    assert run.smoothed_loss(8).tolist()[1:] == [4.5, 3.0, (24 + 4) / 10, (24 + 4 + 2) / 12]
    assert math.isnan(run.smoothed_loss(8)[0])
    assert run.steps_to(3.0, 8) == 3 and run.seconds_to(3.0, 8) == 1.5
    assert run.steps_to(2.0, 8) is None and run.seconds_to(2.0, 8) == math.inf


def test_the_way_is_measured_in_noise_free_steps() -> None:
    run = run_of([10.0, 10.0, 30.0, 30.0], [1.0] * 4, [math.nan, 10.0, math.nan, 30.0])
    way = way_of(run, 4)
    assert way.noise_scale.tolist() == [10.0, 10.0, 10.0, 30.0]
    assert way.ds.tolist() == [0.5, 0.5, 0.75, 0.5]
    with pytest.raises(ValueError, match="no noise scale"):
        way_of(run, 1)


def test_gamma_bounds_what_a_moving_batch_saves() -> None:
    assert Way(np.full(7, 50.0), np.ones(7)).gamma == pytest.approx(1.0)
    assert Way(np.array([1.0, 9.0]), np.ones(2)).gamma == pytest.approx(16 / 20)
    random = np.random.default_rng(1)
    for _ in range(50):
        way = Way(10 ** random.uniform(0, 3, 30), random.uniform(0.1, 1, 30))
        machine = Machine(a=float(10 ** random.uniform(-3, 3)), c=1.0)
        _, best = machine.best_fixed(way)
        assert machine.free(way) <= best <= machine.free(way) / (1 - way.bound) * (1 + 1e-12)


def test_the_best_fixed_batch_is_the_one_that_a_search_finds() -> None:
    way = Way(np.array([4.0, 100.0, 900.0]), np.array([3.0, 2.0, 1.0]))
    machine = Machine(a=2e-3, c=5e-5)
    sizes = np.geomspace(1, 1e5, 20_001)
    times = [machine.fixed(way, size) for size in sizes]
    batch, seconds = machine.best_fixed(way)
    assert batch == pytest.approx(sizes[int(np.argmin(times))], rel=1e-3) and seconds == pytest.approx(min(times))
    assert Machine(2e-3, 5e-5, smallest=1024).best_fixed(way)[0] == 1024


def test_a_followed_batch_comes_to_the_free_ones_time() -> None:
    way = Way(np.full(20_000, 50.0), np.full(20_000, 0.5))
    machine = Machine(a=3e-3, c=4e-5)
    assert machine.followed(way, 4) == pytest.approx(machine.free(way), rel=0.02)
    assert machine.free(way) < machine.followed(way, 4096) < 1.1 * machine.free(way)


def test_costs_are_fitted_and_stay_above_zero() -> None:
    assert affine_cost([(b, 2e-3 + 3e-5 * b) for b in (16, 64, 256)]) == pytest.approx((2e-3, 3e-5))
    a, c = affine_cost([(16, 3e-3), (64, 2e-3), (256, 2e-3)])
    assert a > 0 and c == pytest.approx(2e-5 / 256)


def test_the_all_reduce_of_one_rank_is_free() -> None:
    assert collective_seconds(1, 1e6, 1e-6, 1e-10) == 0.0
    assert collective_seconds(8, 1e6, 1e-6, 1e-10) == pytest.approx(6e-6 + 1.75e-4)
    assert neighbours([16, 32, 64, 128, 256], 64) == [16, 256] and neighbours([16, 32, 64], 32) == []


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    """The tables of recorded runs: where everything is there already the benchmark only shows it."""
    for batch in (16, 64, 256):
        for kind in ("fixed", "auto"):
            steps = 40 + 6400 // batch
            recorded: dict[str, Any] = {
                "examples": [batch] * steps,
                "batch": [batch] * steps,
                "seconds": [1e-3 + 1e-5 * batch] * steps,
                "loss": [0.9 if step < steps - 2 - 1500 // batch else 0.01 for step in range(steps)],
                "noise_scale": [100.0] * steps,
            }
            stored = {"steps": recorded, "changes": [], "gradient_bytes": 4000}
            (tmp_path / f"digits-{kind}-{batch}-0.json").write_text(json.dumps(stored))
    options = ["--quick", "--ranks", "1", "--tasks", "digits", "--results", str(tmp_path)]
    ended = run_command(python(str(BENCHMARK), *options), tmp_path)
    assert ended.code == 0, ended.stderr
    assert "a step takes 1.00 ms + 0.0100 ms an example; mean noise scale 100: a/(cB) = 1.00" in ended.stdout
    assert "gamma = 1.000" in ended.stdout and "best fixed batch 64" in ended.stdout
