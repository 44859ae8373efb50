"""Sharpness-aware minimisation: the weights of a loop written down from the paper, and everything else as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddp.training.data import BatchPlan
from ddp.training.sharpness import Sharpness
from ranks import RankPool
from training_runs import EXAMPLES, INPUTS, differences, job, saved, steps_of, train_ranks

RHO, RATE, STEPS = 0.3, 0.05, 8


def data() -> tuple[Tensor, Tensor]:
    """What the task `Misbehaving` trains on."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(EXAMPLES, INPUTS, generator=generator)
    return inputs, inputs.sum(dim=1) + torch.randn(EXAMPLES, generator=generator)


def gradient(model: nn.Module, examples: Tensor) -> list[Tensor]:
    inputs, targets = data()
    losses = (model(inputs[examples])[:, 0] - targets[examples]).square()
    return list(torch.autograd.grad(losses.mean(), list(model.parameters())))


def m_sharpness(world_size: int) -> tuple[list[Tensor], list[float]]:
    """Weights and gradient norms of a loop in one process: each rank's share has its own way uphill."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 1))
    weights: list[Tensor] = list(model.parameters())
    norms: list[float] = []
    plan = BatchPlan(EXAMPLES, 12, 12, world_size, 0)
    epoch, position = 0, 0
    for _ in range(STEPS):
        mean = [torch.zeros_like(each) for each in weights]
        order = torch.from_numpy(plan.order(epoch))
        for rank in range(world_size):
            share = plan.share(position, rank)
            examples = order[share.start : share.stop]
            own = gradient(model, examples)
            norm = torch.cat([each.flatten() for each in own]).norm()
            before = [each.detach().clone() for each in weights]
            with torch.no_grad():
                for weight, each in zip(weights, own, strict=True):
                    weight.add_(RHO / norm * each)
            for total, each in zip(mean, gradient(model, examples), strict=True):
                total.add_(len(examples) / len(plan.batch(position)) * each)
            with torch.no_grad():
                for weight, each in zip(weights, before, strict=True):
                    weight.copy_(each)
        norms.append(float(torch.cat([each.flatten() for each in mean]).norm()))
        with torch.no_grad():
            for weight, each in zip(weights, mean, strict=True):
                weight.sub_(RATE * each)
        epoch, position = plan.after(epoch, plan.batch(position).stop)
    return weights, norms


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 12), (1, 5), (2, 12), (3, 3)])
def test_it_is_the_loop_of_the_paper(
    rank_pool: RankPool, tmp_path: Path, world_size: int, micro_batch_size: int
) -> None:
    here = job(tmp_path, run__steps=STEPS, optimizer__sam_rho=RHO, micro_batch_size=micro_batch_size)
    ended = train_ranks(rank_pool, world_size, here)
    weights, norms = m_sharpness(world_size)
    assert {one.kind for one in ended} == {""}
    for one in ended:
        for found, expected in zip(one.parameters, weights, strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert [record.gradient_norm for record in steps_of(tmp_path / "run")] == pytest.approx(norms, rel=1e-4)
    assert norms[-1] != pytest.approx(m_sharpness(4)[1][-1], rel=1e-4)  # the number of ranks is part of the method


def test_the_noise_scale_sees_the_gradient_that_is_sent_and_a_resumed_run_is_the_same(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    settings = {"optimizer__sam_rho": RHO, "optimizer__momentum": 0.9, "micro_batch_size": 4}
    for folder, steps in (("whole", 12), ("parts", 7)):
        here = job(tmp_path / folder, run__steps=steps, **settings)
        assert {one.kind for one in train_ranks(rank_pool, 2, here)} == {""}
    train_ranks(rank_pool, 2, job(tmp_path / "parts", run__steps=12, **settings), resume="auto")
    whole, parts = (saved(tmp_path / folder / "run", 12, 2) for folder in ("whole", "parts"))
    assert not differences(whole["shared"]["parameters"], parts["shared"]["parameters"])
    records = steps_of(tmp_path / "whole" / "run")
    assert records[-1].reading is not None and records[-1].reading.observations == 12


def test_it_leaves_weights_statistics_and_generators_as_they_were() -> None:
    torch.manual_seed(1)
    normalisation = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(4, 6), normalisation, nn.Dropout(0.5), nn.Linear(6, 1)).train()
    buffers = dict(normalisation.named_buffers())
    inputs, before = torch.randn(7, 4), [each.clone() for each in model.parameters()]
    drawn: list[Tensor] = []

    def backward() -> None:
        drawn.append(torch.rand(1))
        model(inputs).square().mean().backward()

    with Sharpness(model, 0.5).uphill(backward):
        moved = torch.cat([(now - old).flatten() for now, old in zip(model.parameters(), before, strict=True)])
        assert float(moved.detach().norm()) == pytest.approx(0.5, rel=1e-5)
        statistics = buffers["running_mean"].clone()  # of the first pass
        assert int(buffers["num_batches_tracked"]) == 1
        backward()
    assert torch.equal(*drawn)  # both passes are of the same function
    assert torch.equal(buffers["running_mean"], statistics) and int(buffers["num_batches_tracked"]) == 1
    assert all(torch.equal(now, old) for now, old in zip(model.parameters(), before, strict=True))


def test_a_gradient_of_zero_or_that_is_not_finite_moves_nothing() -> None:
    model = nn.Linear(2, 1)
    for value in (0.0, float("nan"), float("inf")):
        before = model.weight.detach().clone()
        with Sharpness(model, 0.5).uphill(lambda value=value: (model.weight.sum() * value).backward()):
            assert torch.equal(model.weight, before)
