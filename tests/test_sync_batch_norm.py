"""Batch normalisation over ranks: torch's own over the whole batch in one process, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddp.tasks.base import Goal, TensorExamples
from ddp.training.data import split
from ddp.training.evaluation import averaged_buffers
from ddp.training.sync_batch_norm import SyncBatchNorm, synchronised
from ranks import RankPool, process_group
from training_runs import job, saved, train_ranks

CPU = torch.device("cpu")
SHAPES = [(11, 3), (11, 3, 5), (13, 3, 4, 2)]


def whole(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs far from zero, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(len(shape))
    values = 30 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(shape: tuple[int, ...], momentum: float | None, dtype: torch.dtype) -> _BatchNorm:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    torch.manual_seed(5)
    made = kind(3, momentum=momentum).to(dtype)
    with torch.no_grad():
        made.weight.copy_(torch.rand(3) + 0.5)
        made.bias.copy_(torch.randn(3))
    return made


def gradients(layer: nn.Module) -> Tensor:
    return torch.stack([each.grad for each in layer.parameters() if each.grad is not None])


def one_rank(
    rank: int, world_size: int, store_address: str, shape: tuple[int, ...], momentum: float | None
) -> dict[str, Any]:
    with process_group(rank, world_size, store_address):
        synced = synchronised(layer(shape, momentum, torch.float32), CPU).train()
        assert isinstance(synced, SyncBatchNorm)
        values, gradient = whole(shape, torch.float32)
        share = split(range(shape[0]), world_size)[rank]
        mine = values[share.start : share.stop].clone().requires_grad_()
        for _ in range(2):  # running statistics move twice
            outputs = synced(mine)
        outputs.backward(gradient[share.start : share.stop])
        parameters = gradients(synced)
        torch.distributed.all_reduce(parameters)
        evaluated = averaged_buffers(synced, world_size=world_size).eval()(mine)
        return {
            "outputs": outputs.detach(),
            "inputs": mine.grad,
            "parameters": parameters,
            "mean": synced.running_mean,
            "variance": synced.running_var,
            "evaluated": evaluated.detach(),
        }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world_size, momentum", [(1, 0.1), (2, None), (3, 0.1), (4, 0.3)])
def test_it_is_batch_normalisation_of_the_whole_batch(
    rank_pool: RankPool, shape: tuple[int, ...], world_size: int, momentum: float | None
) -> None:
    plain = layer(shape, momentum, torch.float64).train()
    values, gradient = whole(shape, torch.float64)
    values.requires_grad_()
    for _ in range(2):
        outputs = plain(values)
    outputs.backward(gradient)
    found = rank_pool.run(world_size, one_rank, shape, momentum)
    close = {"rtol": 1e-4, "atol": 2e-4, "check_dtype": False}
    torch.testing.assert_close(torch.cat([each["outputs"] for each in found]), outputs.detach(), **close)
    torch.testing.assert_close(torch.cat([each["inputs"] for each in found]), values.grad, **close)
    torch.testing.assert_close(torch.cat([each["evaluated"] for each in found]), plain.eval()(values).detach(), **close)
    for each in found:
        torch.testing.assert_close(each["parameters"], gradients(plain), **close)
        torch.testing.assert_close(each["mean"], plain.running_mean, **close)
        torch.testing.assert_close(each["variance"], plain.running_var, **close)
        assert torch.equal(each["mean"], found[0]["mean"]) and torch.equal(each["variance"], found[0]["variance"])


def test_parameters_and_buffers_stay_the_same_tensors_under_the_same_names() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            converted = synchronised(model, CPU)
            after = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
            assert list(before) == list(after) and all(before[name] is after[name] for name in before)
            layers = [each for each in converted.modules() if isinstance(each, SyncBatchNorm)]
            copies = [each for each in copy.deepcopy(converted).modules() if isinstance(each, SyncBatchNorm)]
            assert len(layers) == 2 and {id(each._group) for each in copies} == {id(layers[0]._group)}
        finally:
            torch.distributed.destroy_process_group()


class Normalised:
    """Classes of points, by a network whose batch normalisation lies in its middle."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        inputs = torch.randn(61, 4, generator=torch.Generator().manual_seed(4))
        data = TensorExamples(inputs, inputs[:, :3].argmax(dim=1))
        return data, data

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": model(batch[0]).argmax(dim=1) == batch[1]}


def test_a_run_with_shares_that_differ_is_that_of_one_rank_with_the_whole_batch(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    """Each example counts alike in what normalisation sends back; and with micro-batches of one all ranks meet as often."""
    settings = {"task__name": "test_sync_batch_norm:Normalised", "normalisation__sync_batch_norm": True}
    settings |= {"run__steps": 9, "optimizer__learning_rate": 0.3, "noise_scale__split": False}
    found = {}
    for ranks, size in ((1, 7), (2, 7), (3, 7), (2, 1)):
        folder = tmp_path / f"{ranks}-{size}"
        ended = train_ranks(rank_pool, ranks, job(folder, global_batch_size=7, micro_batch_size=size, **settings))
        assert {each.kind for each in ended} == {""}, ended[0].message
        found[ranks, size] = saved(folder / "run", 9, ranks)["shared"]["parameters"]
    for case in ((2, 7), (3, 7)):
        torch.testing.assert_close(found[case], found[1, 7], rtol=1e-4, atol=1e-5)
