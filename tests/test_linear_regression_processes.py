"""A noise scale of exactly 101 through the whole path: real ranks, DDP, comm hook, shared memory, rows, window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddp
from ddp.noise.moments import Moments, unbiased_moments
from ddp.noise.noise_scale import NoiseScaleWindow
from ranks import RankPool, process_group

STEPS = 1000
DIMENSIONS, NOISE = 20, 2.0
DECLARED = 32  # what `attach` is told; `step` then says how many examples there really were


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: its transport, its readings, its own gradients (steps, dimensions) and its last weights."""

    transport: str
    readings: list[ddp.Reading]
    gradients: NDArray[np.float64]
    weights: NDArray[np.float32]


def _train(rank: int, world_size: int, store_address: str, counts: Sequence[int]) -> Outcome:
    """Least squares, |theta - w*| = 1, learning rate 0; each rank draws its own examples."""
    generator = torch.Generator().manual_seed(100 * world_size + rank)
    readings, gradients = [], []
    with process_group(rank, world_size, store_address):
        net = nn.Linear(DIMENSIONS, 1, bias=False)
        nn.init.constant_(net.weight, DIMENSIONS**-0.5)  # w* = 0
        model = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        meter = ddp.attach(model, batch_size=DECLARED, transport="shared_memory")
        for _ in range(STEPS):
            inputs = torch.randn(counts[rank], DIMENSIONS, generator=generator)
            targets = NOISE * torch.randn(counts[rank], 1, generator=generator)
            optimizer.zero_grad()
            (0.5 * (model(inputs) - targets).square().mean()).backward()
            optimizer.step()
            readings.append(meter.step(examples=counts[rank]))
            gradients.append(_gradient(inputs.double().numpy(), targets.double().numpy()[:, 0]))
        meter.close()
        return Outcome(meter.transport.name, readings, np.array(gradients), net.weight.detach().numpy())


def _gradient(inputs: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same rank's mean gradient by hand: mean of x (x'theta - y)."""
    return inputs.T @ (inputs.sum(axis=1) * DIMENSIONS**-0.5 - targets) / len(targets)


def _moments_by_hand(outcomes: list[Outcome], counts: Sequence[int]) -> list[Moments]:
    """Each step's moments from the ranks' gradients in float64, each rank with the weight DDP gives it."""
    own = np.stack([outcome.gradients for outcome in outcomes], axis=1)  # (steps, ranks, dimensions)
    norms, means = (own**2).sum(axis=2), (own.mean(axis=1) ** 2).sum(axis=1)
    equal = [1.0] * len(counts)
    moments = [unbiased_moments(norms[i], counts, float(means[i]), equal) for i in range(STEPS)]
    return [each for each in moments if each is not None]


@pytest.mark.parametrize("counts", [(32, 32), (20, 32, 44)])
def test_the_known_answer_through_real_ranks(rank_pool: RankPool, counts: tuple[int, ...]) -> None:
    outcomes = rank_pool.run(len(counts), _train, counts)
    moments = _moments_by_hand(outcomes, counts)
    for outcome in outcomes:
        assert outcome.transport == "shared_memory"
        assert (outcome.weights == np.float32(DIMENSIONS**-0.5)).all()
        assert repr(outcome.readings) == repr(outcomes[0].readings)  # the same bits on every rank
    _within_three_standard_errors_of_101(moments)
    _readings_are_those_by_hand(outcomes[0].readings, moments)
    last = outcomes[0].readings[-1]
    assert last.state == "resolved"
    assert abs(last.noise_scale - 101) < 3 * (last.high - last.low) / 4  # the interval is four standard errors wide


def _within_three_standard_errors_of_101(moments: list[Moments]) -> None:
    trace, norm = np.array([(each.variance_trace, each.squared_norm) for each in moments]).T
    for series, truth in ((trace, 101.0), (norm, 1.0), (trace - 101 * norm, 0.0)):
        assert abs(series.mean() - truth) < 3 * series.std(ddof=1) / math.sqrt(STEPS)


def _readings_are_those_by_hand(readings: list[ddp.Reading], moments: list[Moments]) -> None:
    """One step later, and up to the rounding of float32 gradients."""
    window = NoiseScaleWindow(None)
    assert readings[0].observations == 0
    for reading, each in zip(readings[1:], moments, strict=False):
        expected = window.observe(each)
        assert (reading.observations, reading.window, reading.state) == (
            expected.observations,
            expected.window,
            expected.state,
        )
        assert (reading.noise_scale, reading.low, reading.high) == pytest.approx(
            (expected.noise_scale, expected.low, expected.high), rel=1e-4, nan_ok=True
        )
