"""Ranks whose processors sum in another order: their own sums differ in the last bits, what they decide by must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddp
from ddp.job import Job
from ddp.metering import attached_step
from ddp.metering.probe import GradientProbe
from ddp.noise.tracker import NoiseScaleTracker
from ddp.training import update
from ddp.transport import comm_hook
from ddp.transport.comm_hook import GradientSums
from ranks import RankPool, process_group
from training_runs import job, train_one

ROUNDING = 1 + 2.0**-50
STEPS = 60  # the last ten with Adam's second moments 50 steps old


@contextmanager
def rounding_otherwise(rank: int) -> Iterator[list[str]]:
    """What the tracker reads and what is clipped by, on a rank whose sums over the mean gradient are a little off."""
    factor, decided = ROUNDING if rank else 1.0, []
    add_up, mean_squares = comm_hook.add_up, GradientProbe.mean_squares
    by_parameter = GradientSums.by_parameter
    observe, clip = NoiseScaleTracker.observe, update.clip_

    def off(reductions: Any) -> GradientSums:
        sums = add_up(reductions)
        return replace(sums, mean_squared_norm=factor * sums.mean_squared_norm)

    def noting(function: Callable[..., Any], note: Callable[..., object]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            decided.append(repr(note(result, *arguments)))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm_hook, "add_up", off)
        patch.setattr(attached_step, "add_up", off)
        patch.setattr(GradientProbe, "mean_squares", lambda probe: factor * mean_squares(probe))
        patch.setattr(
            GradientSums,
            "by_parameter",
            lambda sums: {each: (own, factor * mean) for each, (own, mean) in by_parameter(sums).items()},
        )
        patch.setattr(NoiseScaleTracker, "observe", noting(observe, lambda readings, *_: readings))
        patch.setattr(update, "clip_", noting(clip, lambda _, *arguments: arguments[2]))
        yield decided


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_trainers_decide_by_the_same_bits(rank_pool: RankPool, tmp_path: Path, layers: bool, optimizer: str) -> None:
    here = job(
        tmp_path,
        run__steps=STEPS,
        micro_batch_size=3,
        optimizer__name=optimizer,
        optimizer__gradient_clip_norm=1e-3,
        noise_scale__layers=layers,
    )
    first, second = rank_pool.run(2, train_rounding_otherwise, here)
    assert len(first) == 2 * STEPS and first == second
    assert ("headline='preconditioned'" in first[-2]) == (optimizer == "adam")


def train_rounding_otherwise(rank: int, world_size: int, store_address: str, here: Job) -> list[str]:
    with rounding_otherwise(rank) as decided:
        train_one(rank, world_size, store_address, [here] * world_size, None)
    return decided


@pytest.mark.parametrize("layers", [True, False])
def test_attached_scripts_decide_by_the_same_bits(rank_pool: RankPool, layers: bool) -> None:
    first, second = rank_pool.run(2, attach_rounding_otherwise, layers)
    assert len(first) == STEPS and first == second
    assert "headline='preconditioned'" in first[-1]


def attach_rounding_otherwise(rank: int, world_size: int, store_address: str, layers: bool) -> list[str]:
    with rounding_otherwise(rank) as decided, process_group(rank, world_size, store_address):
        torch.manual_seed(rank)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        meter = ddp.attach(model, 3, optimizer=optimizer, sample_every=2, layers=layers)
        for _ in range(STEPS + 1):
            model(torch.randn(3, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            meter.step()
        meter.close()
    return decided[:STEPS]
