"""The optimizers against formulas in float64, and clipping against torch's and a multiplication by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

from ddp.errors import CheckpointError
from ddp.job import OptimizerSection
from ddp.training.optimizers import build_optimizer, clip_, moments, set_momentum_, set_rate_, weight_decay_penalty
from ddp.training.state import OptimizerState

SHAPES = [(7,), (3, 5), (), (0,), (1031,), (4, 2, 3, 3)]
SECTIONS: list[dict[str, Any]] = [
    {"name": "sgd", "learning_rate": 0.1},
    {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.02},
    {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "adam", "learning_rate": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.02},
    {"name": "adamw", "learning_rate": 0.01, "epsilon": 1e-3, "weight_decay": 0.1},
]


def section_of(settings: dict[str, Any]) -> OptimizerSection:
    return OptimizerSection.model_validate(settings)


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def random_gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * (1 + step) for shape in SHAPES]


class Reference:
    """The update rules as they stand in the papers, in NumPy and float64, on one flat vector."""

    def __init__(self, section: OptimizerSection, theta: np.ndarray) -> None:
        self.section = section
        self.theta = theta
        self.first = np.zeros_like(theta)
        self.second = np.zeros_like(theta)
        self.steps = 0

    def step(self, gradient: np.ndarray) -> None:
        s = self.section
        self.steps += 1
        if s.name == "adamw":
            self.theta = self.theta * (1 - s.learning_rate * s.weight_decay)
        else:
            gradient = gradient + s.weight_decay * self.theta
        if s.name == "sgd":
            self.first = s.momentum * self.first + gradient
            update = gradient + s.momentum * self.first if s.nesterov else self.first
        else:
            self.first = s.betas[0] * self.first + (1 - s.betas[0]) * gradient
            self.second = s.betas[1] * self.second + (1 - s.betas[1]) * gradient**2
            mean = self.first / (1 - s.betas[0] ** self.steps)
            variance = self.second / (1 - s.betas[1] ** self.steps)
            update = mean / (np.sqrt(variance) + s.epsilon)
        self.theta = self.theta - s.learning_rate * update


def flat(tensors: list[Any]) -> np.ndarray:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SECTIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_clipped_steps_follow_the_formulas(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Every second norm lies above the limit; the gradient norms grow from about 35 to 200."""
    section, parameters = section_of(settings), make_parameters(dtype)
    optimizer = build_optimizer(section, parameters)
    assert optimizer.defaults["fused"]
    reference = Reference(section, flat(parameters))
    for step in range(6):
        gradients = random_gradients(step)
        norm = float(np.linalg.norm(flat(gradients)))
        max_norm = norm / 3 if step % 2 else norm * 3
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone().to(dtype)  # the fused step scales it in place
        clip_(optimizer, parameters, norm, max_norm)
        optimizer.step()
        clipped = flat(gradients) * min(1.0, max_norm / norm)
        reference.step(clipped)
        left = flat([parameter.grad for parameter in parameters])
        np.testing.assert_allclose(left, clipped, rtol=1e-6, atol=1e-7)  # as after torch's clip_grad_norm_
    np.testing.assert_allclose(flat(parameters), reference.theta, rtol=3e-6, atol=3e-6)


def strided_parameter() -> tuple[Tensor, nn.Parameter]:
    """A parameter with gaps between its elements, and the memory it lies in."""
    memory = torch.zeros(5, 6)
    return memory, nn.Parameter(memory[:, ::2])


def test_a_parameter_with_gaps_is_not_fused_and_its_neighbours_stay_as_they_are() -> None:
    memory, parameter = strided_parameter()
    optimizer = build_optimizer(section_of({"name": "sgd", "learning_rate": 1.0}), [parameter])
    assert not optimizer.defaults["fused"]
    parameter.grad = torch.full((5, 3), 4.0)
    clip_(optimizer, [parameter], 4 * math.sqrt(15), math.sqrt(15))
    optimizer.step()
    assert torch.equal(parameter.grad, torch.ones(5, 3))  # multiplied in place
    assert memory[:, ::2].eq(-1).all()
    assert memory[:, 1::2].eq(0).all()


def test_clipping_without_fusing_leaves_small_gradients_and_missing_ones() -> None:
    _, parameter = strided_parameter()
    frozen = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(section_of({"name": "adam"}), [parameter])
    parameter.grad = torch.ones(5, 3)
    clip_(optimizer, [parameter, frozen], math.sqrt(15), math.sqrt(15))
    assert torch.equal(parameter.grad, torch.ones(5, 3))
    assert frozen.grad is None


def test_an_earlier_clip_does_not_reach_the_next_step() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(section_of({"name": "sgd", "learning_rate": 1.0}), [parameter])
    for norm in (10.0, 1.0):
        parameter.grad = torch.tensor([norm, 0.0, 0.0])
        clip_(optimizer, [parameter], norm, 2.0)
        optimizer.step()
    assert parameter.tolist() == [-3.0, 0.0, 0.0]


def test_a_channels_last_parameter_steps_like_a_contiguous_one() -> None:
    images = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    results: list[Tensor] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        layer = nn.Conv2d(4, 8, 3)
        layer.weight = nn.Parameter(layer.weight.detach().clone(memory_format=memory_format))
        optimizer = build_optimizer(section_of({"name": "adam", "learning_rate": 0.1}), layer.parameters())
        assert optimizer.defaults["fused"]
        for _ in range(2):
            optimizer.zero_grad()
            layer(images).square().sum().backward()
            optimizer.step()
        results.append(layer.weight.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_parameters_without_gradient_are_left_out() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = build_optimizer(section_of({"name": "adamw"}), [frozen, nn.Parameter(torch.ones(3))])
    assert [len(parameter) for parameter in optimizer.param_groups[0]["params"]] == [3]


@pytest.mark.parametrize("settings", SECTIONS[1:], ids=lambda s: s["name"])
def test_a_saved_state_goes_on_bit_for_bit(settings: dict[str, Any]) -> None:
    def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], span: range) -> None:
        for step in span:
            for parameter, gradient in zip(parameters, random_gradients(step), strict=True):
                parameter.grad = gradient
            clip_(optimizer, parameters, 10.0, 4.0)
            optimizer.step()

    whole = make_parameters()
    steps(build_optimizer(section_of(settings), whole), whole, range(6))
    first = make_parameters()
    optimizer = build_optimizer(section_of(settings), first)
    steps(optimizer, first, range(3))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = build_optimizer(section_of(settings), second)
    resumed.load_state_dict(optimizer.state_dict())
    steps(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "momentum": SGD,
    "nesterov": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adadelta": Adadelta,
    "adam": Adam,
    "adamw": AdamW,
}
OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.8},
    "adagrad": {"learning_rate_decay": 0.2, "initial_accumulator_value": 0.3, "epsilon": 1e-4},
    "rmsprop": {"alpha": 0.9, "centered": True, "momentum": 0.4},
    "adadelta": {"rho": 0.7, "epsilon": 1e-4},
}
TORCHS_NAMES = {"learning_rate_decay": "lr_decay", "epsilon": "eps"}


@pytest.mark.parametrize("name", TORCHS)
def test_defaults_are_torchs_and_what_can_be_fused_is(name: str) -> None:
    built = build_optimizer(section_of({"name": name}), make_parameters()).defaults
    torchs = TORCHS[name](make_parameters()).defaults
    ours = {"momentum": 0.9} if name in ("momentum", "nesterov") else {"weight_decay": 0.0} if name == "adamw" else {}
    ours |= {"nesterov": True} if name == "nesterov" else {}
    how = {"fused", "foreach"}
    assert {key: value for key, value in built.items() if key not in how} == {
        **{key: value for key, value in torchs.items() if key not in how},
        **ours,
    }
    assert built.get("fused") is (None if name in ("rmsprop", "adadelta") else True)
    assert built["foreach"] is (True if name in ("rmsprop", "adadelta") else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_clipped_steps_are_torchs_plain_loops(name: str, dtype: torch.dtype) -> None:
    settings = OTHER_SETTINGS[name]
    torchs = {TORCHS_NAMES.get(key, key): value for key, value in settings.items()}
    mine, theirs = make_parameters(dtype), make_parameters(torch.float64)
    optimizer = build_optimizer(
        section_of({"name": name, "weight_decay": 0.02, "learning_rate": 0.1, **settings}), mine
    )
    reference = TORCHS[name](theirs, lr=0.1, weight_decay=0.02, foreach=False, **torchs)
    for step in range(6):
        gradients = random_gradients(step)
        for one, other, gradient in zip(mine, theirs, gradients, strict=True):
            one.grad, other.grad = gradient.clone().to(dtype), gradient.double()
        norm = float(torch.nn.utils.clip_grad_norm_(theirs, 40.0))
        clip_(optimizer, mine, norm, 40.0)
        optimizer.step()
        reference.step()
    np.testing.assert_allclose(flat(mine), flat(theirs), rtol=2e-5, atol=2e-5)


def test_the_penalty_is_what_weight_decay_adds_to_the_loss() -> None:
    layer = nn.Linear(5, 3).double()
    groups = [{"parameters": ["bias"], "weight_decay": 0.0}]
    section = section_of({"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.3, "groups": groups})
    optimizer = build_optimizer(section, layer.named_parameters())
    before = layer.weight.detach().clone()
    assert weight_decay_penalty(optimizer) == pytest.approx(0.15 * float(before.square().sum()), rel=1e-12)
    penalty = 0.15 * layer.weight.square().sum()  # torch's own decay goes down its gradient
    (gradient,) = torch.autograd.grad(penalty, [layer.weight])
    layer.weight.grad, layer.bias.grad = torch.zeros_like(before), torch.zeros(3).double()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - gradient)
    assert weight_decay_penalty(build_optimizer(section_of({"name": "adam"}), layer.parameters())) == 0.0


def test_rates_and_momenta_are_set_by_group() -> None:
    layer = nn.Linear(5, 3)
    groups = [{"parameters": ["w*"], "learning_rate_factor": 3.0}, {"parameters": ["weight", "bias"]}]
    for name in ("rmsprop", "adam", "adadelta"):
        optimizer = build_optimizer(section_of({"name": name, "groups": groups}), layer.named_parameters())
        set_rate_(optimizer, 0.5)
        set_momentum_(optimizer, 0.7)
        assert [group["lr"] for group in optimizer.param_groups] == [1.5, 0.5]
        assert [group["name"] for group in optimizer.param_groups] == ["w*", "weight, bias"]
        for group in optimizer.param_groups:
            assert group.get("momentum", group.get("betas", [0.7])[0]) == 0.7


@pytest.mark.parametrize("name", TORCHS)
def test_the_moments_that_a_checkpoint_will_hold_are_counted(name: str) -> None:
    parameter = nn.Parameter(torch.ones(3))
    section = section_of({"name": name, **OTHER_SETTINGS.get(name, {})})
    optimizer = build_optimizer(section, [parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    held = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim()]
    assert len(held) == moments(section)


def test_a_resumed_run_has_its_jobs_settings_and_the_moments_of_before() -> None:
    def made(**settings: Any) -> tuple[nn.Module, OptimizerState]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, OptimizerState(build_optimizer(section_of(settings), model.named_parameters()))

    model, before = made(name="adam", weight_decay=0.5)
    model(torch.ones(1, 3)).sum().backward()
    before.optimizer.step()
    _, after = made(name="adam", weight_decay=0.1, betas=[0.8, 0.9])
    state = before.state_dict()
    after.check_state(state)
    after.load_state_dict(state)
    (group,) = after.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.9))
    moments = [each["exp_avg"] for each in after.optimizer.state.values()]
    assert all(map(torch.equal, moments, [each["exp_avg"] for each in before.optimizer.state.values()]))


def test_rmsprop_with_moments_that_the_checkpoint_lacks_is_refused() -> None:
    model = nn.Linear(3, 2)
    plain = OptimizerState(build_optimizer(section_of({"name": "rmsprop"}), model.named_parameters()))
    model(torch.ones(1, 3)).sum().backward()
    plain.optimizer.step()
    state = plain.state_dict()
    centered = OptimizerState(
        build_optimizer(section_of({"name": "rmsprop", "centered": True}), model.named_parameters())
    )
    with pytest.raises(CheckpointError, match="RMSprop without grad_avg there"):
        centered.check_state(state)
    plain.check_state(state)
