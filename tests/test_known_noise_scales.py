"""Noise scales with an exact answer, through the trainer and real ranks; and that ranks choose the same steps to sample."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ddp.metering.measurement import NoiseMeasurement, Settings
from ddp.tasks.base import Goal, TensorExamples
from ddp.transport.comm_hook import GradientExchange, comm_hook, register
from ddp.transport.row import StepRow
from ddp.transport.select import select_transport
from ranks import RankPool, process_group
from training_runs import job, saved, train_ranks

D, SIGMA = 20, 2.0
DELTA = D**-0.5  # every component of theta - w*, so that |delta| = 1


class LeastSquares:
    """x ~ N(0, A) with A diagonal, target noise of `SIGMA`, loss (x'theta - y)^2 / 2, |theta - w*| = 1."""

    goals: Mapping[str, Goal] = {}

    def __init__(self, examples: int, spread: float = 0.0) -> None:
        self.examples, self.spread = examples, spread

    def model(self) -> nn.Module:
        model = nn.Linear(D, 1, bias=False)
        nn.init.constant_(model.weight, DELTA)
        return model

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(self.examples, D, generator=generator) * diagonal(self.spread).sqrt()
        examples = TensorExamples(inputs, SIGMA * torch.randn(self.examples, generator=generator))
        return examples, TensorExamples(*(tensor[:8] for tensor in examples.tensors))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (model(batch[0])[:, 0] - batch[1]).square()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {}


def diagonal(spread: float) -> Tensor:
    return torch.linspace(1 - spread, 1 + spread, D)


def answer(spread: float) -> tuple[float, float]:
    """tr(Sigma) and |G|^2 for an endless stream of examples."""
    a, delta = diagonal(spread).double().numpy(), np.full(D, DELTA)
    squared_norm = float(delta @ (a * a * delta))
    return float(a.sum() * (delta @ (a * delta)) + squared_norm + SIGMA**2 * a.sum()), squared_norm


def answer_of_these(task: LeastSquares) -> tuple[float, float]:
    """The same of this finite set, by enumeration; the trace with the denominator N - 1."""
    inputs, targets = (tensor.double() for tensor in task.datasets()[0].tensors)  # type: ignore[attr-defined]
    gradients = inputs * (inputs.sum(dim=1) * DELTA - targets)[:, None]
    return gradients.var(dim=0).sum().item(), gradients.mean(dim=0).square().sum().item()


def observations(pool: RankPool, folder: Path, world_size: int, steps: int, **settings: Any) -> NDArray[np.float64]:
    """Pairs of tr(Sigma) and |G|^2, shape (2, at most 400): the newest."""
    still = {"optimizer__learning_rate": 1e-12, "run__steps": steps, "noise_scale__sample_every": 1}
    ended = train_ranks(pool, world_size, job(folder, **still, **settings))
    assert {one.kind for one in ended} == {""}, ended
    window = saved(folder / "run", steps, world_size)["shared"]["noise_scale"]["whole"]["plain"]
    return np.array([np.frombuffer(window["variance_trace"]), np.frombuffer(window["squared_norm"])])


@pytest.mark.parametrize("spread", [0.0, 0.9])
def test_least_squares_with_known_inputs(rank_pool: RankPool, tmp_path: Path, spread: float) -> None:
    """D + 1 + D sigma^2 = 101 for A = I. Drawn once, so few of many that the set is as good as a stream."""
    assert spread or answer(0.0)[0] == pytest.approx(101.0)
    task = {
        "task__name": "test_known_noise_scales:LeastSquares",
        "task__options": {"examples": 40_000, "spread": spread},
    }
    found = observations(rank_pool, tmp_path, 2, 380, global_batch_size=100, micro_batch_size=25, **task)
    within_three_standard_errors(found, answer(spread))


def test_without_replacement_the_answer_is_that_of_the_set(rank_pool: RankPool, tmp_path: Path) -> None:
    """A batch is a quarter of the set: without the 1/N term |G|^2 would be too small by tr(Sigma)/N, a quarter of it."""
    task = {"task__name": "test_known_noise_scales:LeastSquares", "task__options": {"examples": 400}}
    sizes = {"global_batch_size": 100, "micro_batch_size": 20}
    found = observations(rank_pool, tmp_path, 3, 240, **sizes, **task)
    truth = answer_of_these(LeastSquares(400))
    within_three_standard_errors(found, truth)
    error = found[1].std(ddof=1) / math.sqrt(found.shape[1])
    assert abs(found[1].mean() - found[0].mean() / 400 - truth[1]) > 5 * error


def within_three_standard_errors(found: NDArray[np.float64], truth: tuple[float, float]) -> None:
    scale = truth[0] / truth[1]
    for values, expected in ((found[0], truth[0]), (found[1], truth[1]), (found[0] - scale * found[1], 0.0)):
        assert abs(values.mean() - expected) < 3 * values.std(ddof=1) / math.sqrt(len(values)), (
            values.mean(),
            expected,
        )


@dataclass(frozen=True)
class Seen:
    """Which steps one rank sampled, and every step's readings as text."""

    sampled: list[int]
    intervals: list[int]
    readings: list[str]


def sample_by_the_clock(rank: int, world_size: int, store_address: str, transport: str) -> Seen:
    """Ranks that take different times to measure and to compute, and accumulate different numbers of micro-batches."""
    sampled, intervals, readings = [], [], []
    with process_group(rank, world_size, store_address):
        torch.manual_seed(rank)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))
        exchange = GradientExchange(select_transport(transport, "cpu", 30.0))
        register(model, exchange, comm_hook)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        measurement = NoiseMeasurement(model.module, optimizer, exchange, Settings(None))
        parts, before = rank + 1, time.perf_counter()
        exchange.weight = parts / sum(range(1, world_size + 1))
        for step in range(1, 121):
            measurement.begin(step, accumulates=True)
            for part in range(parts):
                last = part == parts - 1
                with model.no_sync() if not last else torch.enable_grad():
                    (model(torch.randn(2, 6)).square().sum() / (2 * parts)).backward()
                measurement.end_unit(2, 2 * parts)
            time.sleep(0.002 * rank)
            sums = exchange.take()
            seconds, before = time.perf_counter() - before, time.perf_counter()
            fields = measurement.row_fields() | {"mean_squared_norm": sums.mean_squared_norm}
            row = StepRow(
                2 * parts, sums.own_squared_norm, backward_seconds=seconds, projection=sums.projection, **fields
            )
            seen = measurement.observe(exchange.exchange_row(row), sums)
            if seen.method == "micro_batches":
                sampled.append(step)
            intervals.append(seen.sampled_every)
            readings.append(repr(seen))
            optimizer.step()
            optimizer.zero_grad()
        exchange.transport.close()
    return Seen(sampled, intervals, readings)


@pytest.mark.parametrize("world_size, transport", [(2, "c10d"), (3, "shared_memory")])
def test_all_ranks_sample_the_same_steps_and_read_the_same(
    rank_pool: RankPool, world_size: int, transport: str
) -> None:
    seen = rank_pool.run(world_size, sample_by_the_clock, transport)
    assert all(one == seen[0] for one in seen)
    assert set(range(1, 100)) <= set(seen[0].sampled)
    assert len(seen[0].sampled) < 120 and max(seen[0].intervals) > 1
    assert "headline='preconditioned'" in seen[0].readings[-1]
