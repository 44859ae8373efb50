"""The gradient check finds what is wrong, names it, and raises no alarm where nothing is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddp.check.differences import Probe, estimate, judge
from ddp.check.gradient_check import ParameterFinding, check_gradients, choose_entries
from ddp.check.gradient_verdict import from_text, gradient_verdict, has_kinks, looseness, merged, to_text
from ddp.check.verdicts import Verdict


class Wrong(torch.autograd.Function):
    """The identity, whose backward multiplies by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


class Net(nn.Module):
    """Two hidden layers; gradients come `factor` times too large into the parameters called `where`."""

    def __init__(self, where: str = "", factor: float = 1.0, activation: Any = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1)
        self.where, self.factor, self.activation = where, factor, activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(nn.functional.linear(x, *self._of("first")))
        hidden = self.activation(nn.functional.linear(hidden, *self._of("second")))
        return nn.functional.linear(hidden, *self._of("last"))

    def _of(self, layer: str) -> list[Any]:
        named = getattr(self, layer).named_parameters()
        return [Wrong.apply(each, self.factor) if f"{layer}.{name}" == self.where else each for name, each in named]


def verdict_on(model: nn.Module, scale: float = 1.0, **options: Any) -> tuple[Verdict, dict[str, ParameterFinding]]:
    torch.manual_seed(3)
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(3, 3, dtype=torch.float64)

    def loss() -> Tensor:
        return scale * model(x).square().mean()

    found = check_gradients(loss, dict(model.named_parameters()), seed=0, **options)
    return gradient_verdict("gradient", found, layers=3, smooth=not has_kinks(loss())), {
        each.name: each for each in found
    }


def test_a_right_gradient_agrees_to_seven_digits() -> None:
    verdict, found = verdict_on(Net())
    assert verdict.status == "ok"
    assert max(each.error for each in found.values()) < 1e-7
    assert all(each.judged == min(6, size) for each, size in zip(found.values(), (15, 5, 20, 4, 4, 1), strict=True))


@pytest.mark.parametrize(
    ("where", "factor", "status", "error"),
    [
        ("second.weight", 2.0, "failed", 0.5),
        ("second.weight", -1.0, "failed", 2.0),
        ("first.bias", 0.0, "failed", 1.0),
        ("last.bias", 1.02, "failed", 0.02 / 1.02),
        ("second.weight", 1.001, "warning", 1e-3),
        ("second.bias", 1 + 5e-6, "warning", 5e-6),
    ],
)
def test_a_wrong_scale_in_one_parameter_is_named(where: str, factor: float, status: str, error: float) -> None:
    verdict, found = verdict_on(Net(where, factor))
    assert verdict.status == status
    assert where in verdict.found and "1 of 6 parameters" in verdict.found
    assert found[where].error == pytest.approx(error, rel=0.02)
    assert all(each.error < 1e-7 for name, each in found.items() if name != where)


def test_a_wrong_backward_between_layers_spoils_all_parameters_before_it_and_none_after() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = Wrong.apply(torch.tanh(self.first(x)), 1.5)
            return self.last(torch.tanh(self.second(hidden)))

    verdict, found = verdict_on(Cut())
    assert verdict.status == "failed"
    assert {name for name, each in found.items() if each.error > 0.1} == {"first.weight", "first.bias"}
    assert "above 1e-02 in 2 of 6 parameters: first.weight, first.bias; right in second.weight" in verdict.found


@pytest.mark.parametrize("activation", [torch.relu, torch.abs, nn.functional.leaky_relu])
def test_kinks_raise_no_alarm(activation: Any) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        verdict, found = verdict_on(Net(activation=activation))
        assert verdict.status == "ok", verdict.line()
        assert sum(each.judged for each in found.values()) >= 20


def test_a_parameter_that_sits_on_a_kink_is_left_out_and_a_wrong_one_beside_it_is_not() -> None:
    corner = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    wrong = nn.Parameter(torch.ones(3, dtype=torch.float64))
    near = nn.Parameter(torch.full((4,), 3e-6, dtype=torch.float64))  # between two steps of the differences

    def loss() -> Tensor:
        return corner.relu().sum() + near.abs().sum() + Wrong.apply(wrong, 3.0).square().sum()

    found = {
        each.name: each for each in check_gradients(loss, {"corner": corner, "near": near, "wrong": wrong}, seed=0)
    }
    assert (found["corner"].kinks, found["corner"].judged) == (3, 0)
    assert found["near"].judged == 4 and found["near"].error < 1e-7
    assert found["wrong"].error == pytest.approx(2 / 3)
    verdict = gradient_verdict("gradient", list(found.values()), layers=1, smooth=False)
    assert verdict.status == "failed" and "wrong[" in verdict.found and "corner" not in verdict.found
    only = gradient_verdict("gradient", [found["corner"]], layers=1, smooth=False)
    assert only.status == "warning" and "3 at kinks" in only.found


def test_zero_both_ways_is_no_error_and_a_lost_gradient_is_one() -> None:
    dead, lost = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))

    def loss() -> Tensor:
        return (dead - 2).relu().sum() + 1e-8 * Wrong.apply(lost, 0.0).square().sum() + 1.0

    found = {each.name: each for each in check_gradients(loss, {"dead": dead, "lost": lost}, seed=0)}
    assert found["dead"].is_dead and found["dead"].error == 0.0
    assert found["lost"].error == pytest.approx(1.0)


def test_an_unused_parameter_is_dead() -> None:
    used, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    found = check_gradients(lambda: used.square().sum(), {"used": used, "unused": unused}, seed=0)
    assert [each.is_dead for each in found] == [False, True]


@pytest.mark.parametrize("scale", [1e-14, 1e-60])
def test_tiny_gradients_are_scaled_up_and_judged(scale: float) -> None:
    right, found = verdict_on(Net(), scale)
    assert right.status == "ok" and "under 1e-10" in right.found
    assert all(each.scale > 1e3 and not each.is_dead for each in found.values())
    wrong, _ = verdict_on(Net("last.weight", 1.5), scale)
    assert wrong.status == "failed" and "last.weight" in wrong.found


def test_a_tiny_gradient_beside_a_large_loss_is_not_called_wrong() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    (found,) = check_gradients(lambda: 1e-13 * weight.square().sum() + 100.0, {"weight": weight}, seed=0)
    assert found.judged == 0 or found.error < 1e-2 or found.is_dead


def test_values_that_are_not_finite_fail() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    found = check_gradients(lambda: weight.sqrt().sum(), {"weight": weight}, seed=0)
    assert gradient_verdict("gradient", found, layers=1, smooth=True).status == "failed"


def test_parameters_are_put_back_also_where_the_loss_raises() -> None:
    weight, calls = nn.Parameter(torch.ones(3, dtype=torch.float64)), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("in the middle")
        return weight.square().sum()

    with pytest.raises(ValueError, match="in the middle"):
        check_gradients(loss, {"weight": weight}, seed=0)
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_sparse_gradients_and_scalars_are_taken() -> None:
    table = nn.Embedding(7, 3, sparse=True).double()
    factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    rows = torch.tensor([1, 4])
    found = check_gradients(
        lambda: (factor * table(rows)).square().sum(), {"table": table.weight, "factor": factor}, seed=0
    )
    assert max(each.error for each in found) < 1e-7 and found[1].entry() == "factor"


def test_a_request_to_stop_ends_early() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert check_gradients(weight.sum, {"weight": weight}, seed=0, asked_to_stop=lambda: True) == []


def test_entries_are_the_largest_and_others_each_once() -> None:
    gradient = torch.arange(40.0).view(8, 5)
    chosen = choose_entries(gradient, 6, np.random.default_rng(0))
    assert chosen[:3] == [(7, 4), (7, 3), (7, 2)] and len(set(chosen)) == 6
    assert len(choose_entries(torch.zeros(2, 2), 6, np.random.default_rng(0))) == 4


def test_deep_networks_are_judged_less_strictly() -> None:
    assert [looseness(layers) for layers in (1, 3, 10, 50)] == [1.0, 1.0, 10.0, 10.0]
    finding = ParameterFinding("weight", 6, 0, 0, 0, 2e-2, (0,), 1.0, 1.02, 1.0, resolved=True)
    shallow, deep = (gradient_verdict("gradient", [finding], layers=layers, smooth=True) for layers in (2, 12))
    assert (shallow.status, deep.status) == ("failed", "warning")
    small = ParameterFinding("weight", 6, 0, 0, 0, 1e-5, (0,), 1.0, 1.0, 1.0, resolved=True)
    assert [gradient_verdict("gradient", [small], layers=2, smooth=each).status for each in (True, False)] == [
        "warning",
        "ok",
    ]


def test_the_estimate_has_its_own_uncertainty() -> None:
    def probe(step: float) -> Probe:
        return Probe(step, step, float(np.exp(1 + step)), float(np.exp(1 - step)))

    found = estimate([probe(step) for step in (1e-1, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)])
    assert abs(found.value - np.e) <= found.uncertainty < 1e-8
    assert judge(np.e, np.e, [probe(1e-4), probe(1e-5), probe(1e-6)]).error < 1e-9


def test_findings_of_ranks_meet_in_the_worst() -> None:
    one = [ParameterFinding("weight", 4, 1, 2, 0, 1e-9, (0, 1), 1.0, 1.0, 1.0, resolved=False)]
    other = [ParameterFinding("weight", 5, 0, 0, 1, 0.5, (2, 3), 1.0, 2.0, 1.0, resolved=True)]
    (both,) = merged([from_text(to_text(each)) for each in (one, other)])
    assert (both.judged, both.zeros, both.kinks, both.unresolved) == (9, 1, 2, 1)
    assert (both.error, both.index) == (0.5, (2, 3))
