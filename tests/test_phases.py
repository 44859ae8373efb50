"""The stopwatch of a step, and what a training run says about where its time went."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ddp.job import Job
from ddp.metering.measurement import NoiseMeasurement
from ddp.noise.sampling import SamplingCadence
from ddp.telemetry.records import PHASES, StepRecord
from ddp.training.phases import PhaseClock
from ranks import RankPool
from training_runs import job, steps_of, train_one, train_ranks


def test_laps_add_up_to_the_elapsed_time() -> None:
    clock = PhaseClock()
    for phase in ("data", "forward", "backward", "forward", "backward", "exchange", "optimizer"):
        clock.lap(phase)
    phases = clock.seconds(hook_seconds=0.0, wait_seconds=0.0)
    total = sum(getattr(phases, phase) for phase in PHASES)
    assert 0 < total <= clock.elapsed_seconds
    assert phases.wait == 0


def test_the_hook_is_communication_and_not_backward() -> None:
    clock = PhaseClock()
    for phase in ("data", "forward", "backward", "exchange", "optimizer"):
        time.sleep(0.02)
        clock.lap(phase)
    phases = clock.seconds(hook_seconds=0.015, wait_seconds=0.025)
    everything = clock.seconds(hook_seconds=0.0, wait_seconds=0.0)
    assert phases.backward == pytest.approx(everything.backward - 0.015)
    assert phases.all_reduce == pytest.approx(everything.all_reduce + 0.015 - 0.025)
    assert phases.wait == 0.025
    assert (phases.data, phases.forward, phases.optimizer) == (
        everything.data,
        everything.forward,
        everything.optimizer,
    )
    assert min(phases.data, phases.forward, everything.backward, phases.optimizer) >= 0.02


def test_waiting_is_never_more_than_there_was() -> None:
    clock = PhaseClock()
    for phase in ("data", "forward", "backward", "exchange", "optimizer"):
        clock.lap(phase)
    phases = clock.seconds(hook_seconds=0.0, wait_seconds=9.0)
    assert phases.all_reduce == 0 < phases.wait < clock.elapsed_seconds


@pytest.mark.parametrize(
    ("transport", "overlap"), [("shared_memory", False), ("shared_memory", True), ("c10d", False), ("c10d", True)]
)
@pytest.mark.parametrize("slow_rank", [0, 2])
def test_phases_fill_the_step_and_tell_who_is_slow(
    rank_pool: RankPool, tmp_path: Path, transport: str, overlap: bool, slow_rank: int
) -> None:
    settings: dict[str, Any] = {
        "task__options": {"action": "slow", "rank": slow_rank},
        "transport__name": transport,
        "transport__overlap": overlap,
    }
    here = job(tmp_path, run__steps=8, micro_batch_size=2, **settings)
    assert {ended.kind for ended in train_ranks(rank_pool, 3, here)} == {""}
    records = steps_of(tmp_path / "run")
    # In the first step's forward DDP agrees on its buckets, so everyone waits there for the slow rank.
    assert [slowest(record) for record in records[2:]] == [slow_rank] * 6
    for before, record in pairwise(records[1:]):
        assert all(set(phases) == set(PHASES) and min(phases.values()) >= 0 for phases in record.phase_seconds)
        assert sum(record.phase_seconds[0].values()) <= before.duration_seconds  # which is rank 0's
    for phase in PHASES:
        assert sum(record.phase_seconds[0][phase] for record in records) > 0
    total = sum(sum(record.phase_seconds[0].values()) for record in records[1:])
    assert total > 0.8 * sum(record.duration_seconds for record in records[:-1])
    own, others = zip(*(own_and_others(records, rank) for rank in range(3)), strict=True)
    assert own[slow_rank] > max(seconds for rank, seconds in enumerate(own) if rank != slow_rank)
    assert others[slow_rank] < min(seconds for rank, seconds in enumerate(others) if rank != slow_rank)


def slowest(record: StepRecord) -> int:
    own = [each["data"] + each["forward"] + each["backward"] for each in record.phase_seconds]
    return own.index(max(own))


def own_and_others(records: list[StepRecord], rank: int) -> tuple[float, float]:
    """Seconds up to the rank's own last gradients, and seconds in the exchange, from the second step on."""
    phases = [record.phase_seconds[rank] for record in records[2:]]
    own = sum(each["data"] + each["forward"] + each["backward"] for each in phases)
    return own, sum(each["all_reduce"] + each["wait"] for each in phases)


def test_a_step_takes_at_least_what_was_measured_in_it(rank_pool: RankPool, tmp_path: Path) -> None:
    here = job(tmp_path, run__steps=12, micro_batch_size=2, noise_scale__sample_every="auto")
    for measuring, whole in rank_pool.run(2, train_slow_to_measure, here)[0]:
        assert measuring == 0 or measuring > 0.03
        assert whole > measuring


def train_slow_to_measure(rank: int, world_size: int, store_address: str, here: Job) -> list[tuple[float, float]]:
    """What the cadence was told: seconds of measuring, and of the step, from the second on."""
    observe, moments, told = SamplingCadence.observe, NoiseMeasurement._moments, []

    def listening(cadence: SamplingCadence, measuring: float, whole: float) -> None:
        told.append((measuring, whole))
        observe(cadence, measuring, whole)

    def slow(measurement: NoiseMeasurement, *arguments: Any) -> Any:
        time.sleep(0.03)
        return moments(measurement, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingCadence, "observe", listening)
        patch.setattr(NoiseMeasurement, "_moments", slow)
        train_one(rank, world_size, store_address, [here] * world_size, None)
    return told[1:]
