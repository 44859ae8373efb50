"""What leaf hooks see, Adam's preconditioner, and the parts of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from ddp.metering.measurement import has_batch_statistics
from ddp.metering.parts import parts_of
from ddp.metering.preconditioner import preconditioner_of
from ddp.metering.probe import GradientProbe


class Shared(nn.Module):
    """A convolution, a layer used twice, a parameter of its own, a frozen one, one that only every other loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 2)
        self.twice = nn.Linear(12, 12)
        self.block = nn.Sequential(nn.Linear(12, 2), nn.Linear(12, 2))
        self.scale = nn.Parameter(torch.ones(1))
        self.block[1].bias.requires_grad_(False)

    def forward(self, images: Tensor, head: int) -> Tensor:
        hidden = self.convolution(images).flatten(1)
        return self.scale * self.block[head](self.twice(torch.tanh(self.twice(hidden))))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_each_backward_is_a_unit_before_it_is_accumulated() -> None:
    torch.manual_seed(0)
    model = Shared()
    parameters = trained(model)
    probe = GradientProbe(parameters)
    expected = np.zeros(len(parameters))
    probe.start()
    for examples, head in ((3, 0), (4, 1)):
        images = torch.randn(examples, 2, 3, 3)
        (model(images, head).square().sum() / 7).backward()
        probe.end_unit(examples, weight=examples, factor=7 / examples)
        own = torch.autograd.grad(model(images, head).square().sum() / examples, parameters, allow_unused=True)
        expected += examples * np.array([0.0 if each is None else each.double().square().sum().item() for each in own])
    sums = probe.stop()
    assert (sums.units.count, sums.units.examples, sums.units.weight_per_example) == (2, 7, 2)
    assert sums.weighted[:, 0] == pytest.approx(expected, rel=1e-5)
    assert not sums.weighted[:, 1].any()
    mean = [parameter.grad.double().square().sum().item() for parameter in parameters if parameter.grad is not None]
    assert probe.mean_squares()[:, 0] == pytest.approx(mean, rel=1e-6)


def test_without_start_and_after_stop_nothing_is_seen() -> None:
    model = nn.Linear(3, 1)
    probe = GradientProbe(trained(model))
    for _ in range(2):
        probe.start()
        probe.stop()
        model(torch.ones(2, 3)).sum().backward()
        probe.end_unit(2, 2.0, 1.0)
        assert probe.stop().units.count == 0 and probe.backwards == 0


class _NoGradient(torch.autograd.Function):
    """Of its second argument none."""

    @staticmethod
    def forward(_context: Any, one: Tensor, two: Tensor) -> Tensor:
        return one * two

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def test_a_gradient_that_is_none_and_one_that_is_sparse_are_passed_over() -> None:
    embedding, one, two = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    probe = GradientProbe([embedding.weight, one, two])
    probe.start()
    (_NoGradient.apply(one, two) + embedding(torch.tensor([1]))).sum().backward()
    probe.end_unit(2, 2.0, 1.0)
    assert probe.stop().weighted[:, 0].tolist() == [0.0, 2 * 2.0, 0.0]


OPTIMIZERS = {
    "adam": lambda parameters: Adam(parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-4),
    "adam fused": lambda parameters: Adam(parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-4, fused=True),
    "adamw fused": lambda parameters: AdamW(parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-4, fused=True),
    "amsgrad": lambda parameters: Adam(parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-4, amsgrad=True),
    "one by one": lambda parameters: Adam(parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-4, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preconditioner_is_what_the_optimizer_divides_by(name: str) -> None:
    """From the weights before and after a step: delta = -rate * m_hat * P, with P after that step."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(40, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight])
    preconditioner = preconditioner_of(optimizer)
    assert preconditioner is not None and preconditioner.denominators() == {}
    first = torch.zeros(40, dtype=torch.float64)
    for step in range(1, 8):
        weight.grad = torch.randn(40, dtype=torch.float64) * (5 if step == 3 else 1)
        first = 0.8 * first + 0.2 * weight.grad
        before = weight.detach().clone() * (1 - 0.01 * optimizer.param_groups[0]["weight_decay"] * ("w" in name))
        optimizer.step()
        applied = (before - weight.detach()) / (0.01 * first / (1 - 0.8**step))
        assert preconditioner.denominators(step + 1) == {}
        denominator = preconditioner.denominators(step)[weight]
        found = 1 / (denominator.second_moment.sqrt() * denominator.root_correction + denominator.epsilon)
        assert found.numpy() == pytest.approx(applied.numpy(), rel=1e-6)


def test_only_adam_has_one_and_what_has_not_settled_is_left_out() -> None:
    """50 steps settle a parameter; one that is used late says nothing until then, unless it is most of what there is."""
    one, small, large = (nn.Parameter(torch.ones(size)) for size in (4, 3, 9))
    assert preconditioner_of(SGD([one])) is None and preconditioner_of(None) is None
    optimizer = Adam([one, small, large])
    preconditioner = preconditioner_of(optimizer)
    assert preconditioner is not None

    def settled(steps: int, *used: nn.Parameter) -> set[int] | None:
        for _ in range(steps):
            for each in (one, small, large):
                each.grad = torch.ones_like(each) if any(each is other for other in used) else None
            optimizer.step()
        found = preconditioner.settled()
        return None if found is None else {each.numel() for each in found}

    assert settled(0) is None and settled(49, one) is None
    assert settled(1, one) == {4}, "those that never had a gradient say nothing"
    assert settled(49, one, small) == {4}
    assert settled(1, one, small) == {4, 3}
    assert settled(1, one, large) is None, "most of it has just begun"
    assert settled(49, one, large) == {4, 3, 9}
    small.requires_grad_(False)
    assert settled(0) == {4, 9}


def test_layers_are_modules_with_parameters_and_groups_the_optimizers() -> None:
    model = Shared()
    parameters = trained(model)
    names = parts_of(model, parameters, SGD(parameters, lr=1.0)).names
    assert names == tuple(("layer", name) for name in ("scale", "convolution", "twice", "block.0", "block.1"))
    groups = [{"params": parameters[:3], "name": "early"}, {"params": parameters[3:]}]
    parts = parts_of(model, parameters, SGD(groups, lr=1.0))
    assert parts.names[5:] == (("group", "early"), ("group", "1"))
    numbers = np.exp2(np.arange(len(parameters), dtype=np.float64))
    assert parts.sums(np.stack([numbers, -numbers], axis=1))[:, 0].tolist() == [
        *expected_sums(model, parameters, names),
        7.0,
        numbers.sum() - 7,
    ]


def expected_sums(model: nn.Module, parameters: list[nn.Parameter], names: Iterable[tuple[str, str]]) -> list[float]:
    place = {parameter: index for index, parameter in enumerate(parameters)}
    modules = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules() if name}
    modules["scale"] = [model.get_parameter("scale")]
    return [sum(2.0 ** place[each] for each in modules[name] if each in place) for _, name in names]


@pytest.mark.parametrize(
    "layer, has",
    [(nn.BatchNorm1d(2), True), (nn.SyncBatchNorm(2), True), (nn.LayerNorm(2), False), (nn.InstanceNorm1d(2), False)],
    ids=str,
)
def test_batch_statistics_are_those_of_normalisation_in_training(layer: nn.Module, has: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))
    assert has_batch_statistics(model) == has
    assert not has_batch_statistics(model.eval())
