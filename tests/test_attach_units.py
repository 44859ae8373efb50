"""What an attached script's steps add up to: backwards as units, Adam's metric, layers, loss scales, weights."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import ddp
from ddp.noise.moments import Moments, unbiased_moments
from ddp.noise.readings import NoiseReadings
from ranks import RankPool, process_group

INPUTS, BATCH = 5, 3


@dataclass(frozen=True)
class Script:
    """A training script; `backwards` is what each rank accumulates in a step."""

    backwards: tuple[int, ...]
    steps: int = 6
    adam: bool = False
    ddp_options: dict[str, Any] = field(default_factory=dict)
    attach_options: dict[str, Any] = field(default_factory=dict)
    divided: bool = True
    clip: float | None = None
    scale: float | None = None  # of a GradScaler at first
    autocast: torch.dtype | None = None
    bad_step: tuple[int, int] | None = None  # step and rank with a value that is not finite
    tokens: tuple[int, ...] | None = None  # of each rank, by which the script weights its loss
    no_examples: int | None = None  # a rank whose loss is multiplied by zero
    transport: str = "shared_memory"
    overlap: bool = False


@dataclass
class Seen:
    """Of one rank: gradients in float64, by step and unit, as a list of parameters; P likewise; readings."""

    units: list[list[list[Tensor]]] = field(default_factory=list)
    preconditioners: list[list[Tensor]] = field(default_factory=list)
    readings: list[NoiseReadings] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # before the first step and after each


def make_model(options: dict[str, Any]) -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(INPUTS, 7), nn.Tanh(), nn.Linear(7, 1)), **options)


def rows_of(rank: int, step: int, index: int) -> Tensor:
    return torch.randn(BATCH, INPUTS + 1, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + index))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows[:, :INPUTS])[:, 0] - rows[:, INPUTS]).square().mean()


def gradients_of(module: nn.Module, rows: Tensor) -> list[Tensor]:
    return [each.double() for each in torch.autograd.grad(loss_of(module, rows), list(module.parameters()))]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def preconditioner(optimizer: Optimizer, module: nn.Module) -> list[Tensor]:
    """1 / (sqrt(v_hat) + eps) from the optimizer's state, by hand."""
    result = []
    for parameter in module.parameters():
        state = optimizer.state[parameter]
        if "step" not in state:
            return []
        hat = state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))
        result.append(1 / (hat.sqrt() + 1e-8))
    return result


def train(rank: int, world_size: int, store_address: str, script: Script) -> Seen:
    seen, count = Seen(), script.backwards[rank]
    with process_group(rank, world_size, store_address):
        model = make_model(script.ddp_options)
        if script.adam:
            layers = model.module[0], model.module[2]  # type: ignore[index]
            optimizer = AdamW([{"params": list(each.parameters()), "lr": 0.01} for each in layers])
        else:
            optimizer = SGD(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=script.scale, growth_interval=3) if script.scale else None
        meter = ddp.attach(
            model,
            BATCH,
            script.transport,
            overlap=script.overlap,
            optimizer=optimizer,
            grad_scaler=scaler,
            **script.attach_options,
        )
        seen.weights.append(flat(model))
        for step in range(script.steps):
            batches = [rows_of(rank, step, index) for index in range(count)]
            seen.units.append([gradients_of(model.module, rows) for rows in batches])
            seen.preconditioners.append(preconditioner(optimizer, model.module) if script.adam else [])
            optimizer.zero_grad()
            for index, rows in enumerate(batches):
                bad = script.bad_step == (step, rank) and index == 0
                with contextlib.nullcontext() if index == count - 1 else model.no_sync():
                    with torch.autocast("cpu", script.autocast, enabled=script.autocast is not None):
                        loss = loss_of(model, rows.clone().fill_(math.inf) if bad else rows) / (
                            count if script.divided else 1
                        )
                    if script.tokens is not None:
                        loss = loss * world_size * script.tokens[rank] / sum(script.tokens)
                    if script.no_examples == rank:
                        loss = loss * 0.0
                    (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            if script.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), script.clip)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            elif script.bad_step is None or step != script.bad_step[0]:
                optimizer.step()
            examples = 0 if script.no_examples == rank else None
            meter.step(examples, weight=script.tokens[rank] if script.tokens else None)
            seen.readings.append(meter.readings)
            seen.weights.append(flat(model))
        meter.close()
    return seen


def expected(
    results: Sequence[Seen],
    steps: Sequence[int],
    *,
    members: slice = slice(None),
    shares: Sequence[float] | None = None,
    examples: Sequence[float] | None = None,
    population: float = math.inf,
    preconditioned: bool = False,
) -> Moments:
    """Mean over `steps` of the moments by hand, of the parameters `members`; ranks have equal shares unless said."""
    norms, traces = [], []
    for step in steps:
        units, weights = [], []
        for rank, seen in enumerate(results):
            for unit in seen.units[step]:
                share = 1.0 if shares is None else shares[rank]
                scales = seen.preconditioners[step] if preconditioned else [torch.ones(())] * len(unit)
                units.append(
                    torch.cat([(g * p.sqrt()).flatten() for g, p in list(zip(unit, scales, strict=True))[members]])
                )
                weights.append(share / len(seen.units[step]))
        total = sum(weights)
        mean = sum((w / total * g for w, g in zip(weights, units, strict=True)), start=torch.zeros(()))
        moments = unbiased_moments(
            [float(each @ each) for each in units],
            examples or [BATCH] * len(units),
            float(mean @ mean),
            weights,
            population,
        )
        assert moments is not None
        norms.append(moments.squared_norm)
        traces.append(moments.variance_trace)
    return Moments(sum(norms) / len(norms), sum(traces) / len(traces))


def assert_is(reading: ddp.Reading, moments: Moments, tolerance: float = 1e-4) -> None:
    scale = abs(moments.variance_trace) + abs(moments.squared_norm)
    assert reading.squared_norm == pytest.approx(moments.squared_norm, rel=tolerance, abs=1e-2 * tolerance * scale)
    assert reading.variance_trace == pytest.approx(moments.variance_trace, rel=tolerance)


SEVERAL_BUCKETS = {"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True}


@pytest.mark.parametrize(
    "backwards, transport, overlap, options",
    [
        ((4,), "shared_memory", False, {}),
        ((3, 1), "shared_memory", False, SEVERAL_BUCKETS),
        ((2, 3, 1), "shared_memory", True, {}),
        ((2, 3, 1, 1), "c10d", False, SEVERAL_BUCKETS),
        ((1, 2), "c10d", True, {}),
        ((1, 1), "shared_memory", False, {"static_graph": True}),  # torch refuses no_sync in its first backward
    ],
)
def test_units_are_the_backwards_of_all_ranks(
    rank_pool: RankPool, backwards: tuple[int, ...], transport: str, overlap: bool, options: dict[str, Any]
) -> None:
    script = Script(backwards, transport=transport, overlap=overlap, ddp_options=options)
    results = rank_pool.run(len(backwards), train, script)
    whole = expected(results, range(5))
    layers = {
        "0": expected(results, range(5), members=slice(0, 2)),
        "2": expected(results, range(5), members=slice(2, 4)),
    }
    for seen in results:
        last = seen.readings[-1]
        assert (
            last.method == ("micro_batches" if max(backwards) > 1 else "ranks")
            and last.headline == "plain"
            and last.preconditioned is None
        )
        assert last.plain.observations == 5
        assert_is(last.plain, whole)
        assert [(each.part, each.name, each.metric) for each in last.parts] == [
            ("layer", "0", "plain"),
            ("layer", "2", "plain"),
        ]
        for part in last.parts:
            assert part.reading.observations == 5
            assert_is(part.reading, layers[part.name])


@pytest.mark.parametrize("backwards", [(1, 1), (2, 1)])
@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_adam_sees_a_noise_scale_of_its_own(
    rank_pool: RankPool, backwards: tuple[int, ...], scale: float | None
) -> None:
    script = Script(backwards, steps=57, adam=True, scale=scale)
    results = rank_pool.run(2, train, script)
    observed = range(50, 56)
    for seen in results:
        assert [each.headline for each in seen.readings[:52]] == ["plain"] * 51 + ["preconditioned"]
        last = seen.readings[-1]
        assert last.preconditioned is not None and last.preconditioned.observations == len(observed)
        assert last.reading is last.preconditioned
        assert_is(last.preconditioned, expected(results, observed, preconditioned=True), 1e-3)
        parts = {(each.part, each.name, each.metric): each.reading for each in last.parts}
        assert len(parts) == 8  # two layers and two groups in two metrics
        for name, group, members in (("0", "0", slice(0, 2)), ("2", "1", slice(2, 4))):
            moments = expected(results, observed, members=members, preconditioned=True)
            assert_is(parts["layer", name, "preconditioned"], moments, 1e-3)
            assert_is(parts["group", group, "preconditioned"], moments, 1e-3)


def test_sampled_steps_look_closer_and_the_others_have_the_ranks(rank_pool: RankPool) -> None:
    results = rank_pool.run(2, train, Script((2, 2), steps=8, attach_options={"sample_every": 3}))
    for seen in results:
        # A step's reading comes with the next: the 3rd and the 6th are sampled.
        methods = ["none", "ranks", "ranks", "micro_batches", "ranks", "ranks", "micro_batches", "ranks"]
        assert [each.method for each in seen.readings] == methods
        assert [bool(each.parts) for each in seen.readings] == [False, False, False, True, True, True, True, True]
        assert seen.readings[-1].plain.observations == 7 and seen.readings[-1].sampled_every == 3
    both = results[0].readings[-2].parts[0].reading
    assert_is(both, expected(results, [2, 5], members=slice(0, 2)))


@pytest.mark.parametrize("layers", [True, False])
def test_a_loss_scale_that_grows_is_undone(rank_pool: RankPool, layers: bool) -> None:
    options = {"layers": layers}
    plain = rank_pool.run(2, train, Script((2, 1), steps=9, attach_options=options))
    scaled = rank_pool.run(2, train, Script((2, 1), steps=9, attach_options=options, scale=2.0**10))
    for one, other in zip(plain, scaled, strict=True):
        assert torch.allclose(one.weights[-1], other.weights[-1], rtol=1e-5, atol=1e-7)
        for before, after in zip(one.readings[1:], other.readings[1:], strict=True):
            assert after.plain.variance_trace == pytest.approx(before.plain.variance_trace, rel=1e-5)
            for part, scaled_part in zip(before.parts, after.parts, strict=True):
                assert scaled_part.reading.variance_trace == pytest.approx(part.reading.variance_trace, rel=1e-5)
        assert len(one.readings[-1].parts) == (2 if layers else 0)


@pytest.mark.parametrize("dtype, scale", [(torch.float16, 2.0**22), (torch.bfloat16, 2.0**127)])
def test_steps_that_a_scaler_skips_are_left_out(rank_pool: RankPool, dtype: torch.dtype, scale: float) -> None:
    """The scale is halved until the gradient is finite; autocast rounds to 11 or 8 bits."""
    results = rank_pool.run(2, train, Script((1, 1), steps=20, scale=scale, autocast=dtype))
    for seen in results:
        moved = [not torch.equal(before, after) for before, after in itertools.pairwise(seen.weights)]
        taken = [step for step, took in enumerate(moved[:-1]) if took]
        assert 5 < len(taken) < 19
        assert seen.readings[-1].plain.observations == len(taken)
        assert_is(seen.readings[-1].plain, expected(results, taken), 0.1)


@pytest.mark.parametrize("backwards", [(1, 1, 1), (2, 2, 2)])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(
    rank_pool: RankPool, backwards: tuple[int, ...]
) -> None:
    results = rank_pool.run(3, train, Script(backwards, bad_step=(2, 1)))
    for seen in results:
        assert [each.plain.observations for each in seen.readings] == [0, 1, 2, 2, 3, 4]
        assert seen.readings[3].method == "none"
        assert_is(seen.readings[-1].plain, expected(results, [0, 1, 3, 4]))


def test_clipping_and_undivided_losses(rank_pool: RankPool) -> None:
    """Clipping changes nothing; four backwards that are not divided have sixteen times both moments."""
    clipped = rank_pool.run(2, train, Script((4, 4), clip=1e-3))
    assert_is(clipped[0].readings[-1].plain, expected(clipped, range(5)))
    whole = rank_pool.run(2, train, Script((4, 4), divided=False))
    moments = expected(whole, range(5))
    assert_is(whole[0].readings[-1].plain, Moments(16 * moments.squared_norm, 16 * moments.variance_trace))


def test_weights_of_tokens_a_rank_without_examples_and_a_population(rank_pool: RankPool) -> None:
    tokens = (5, 11, 2)
    weighted = rank_pool.run(3, train, Script((2, 1, 3), tokens=tokens))
    for seen in weighted:
        assert_is(seen.readings[-1].plain, expected(weighted, range(5), shares=tokens))
        assert_is(seen.readings[-1].parts[1].reading, expected(weighted, range(5), shares=tokens, members=slice(2, 4)))
    empty = rank_pool.run(3, train, Script((2, 1, 1), no_examples=1))
    for seen in empty:
        assert_is(seen.readings[-1].plain, expected(empty, range(5), shares=(1, 0, 1)))
        assert_is(seen.readings[-1].parts[0].reading, expected(empty, range(5), shares=(1, 0, 1), members=slice(0, 2)))
    finite = rank_pool.run(2, train, Script((1, 1), attach_options={"population": 20}))
    assert_is(finite[0].readings[-1].plain, expected(finite, range(5), population=20))


class _HalfUsed(nn.Module):
    """One of two layers never has a part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(3, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.used(rows)


def _half_used(rank: int, world_size: int, store_address: str) -> tuple[bool, NoiseReadings]:
    with process_group(rank, world_size, store_address):
        torch.manual_seed(0)
        model = DistributedDataParallel(_HalfUsed(), find_unused_parameters=True)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        meter = ddp.attach(model, batch_size=8, transport="shared_memory", overlap=False, optimizer=optimizer)
        prepared = torch.float64 in meter.transport._ready  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(rank)
        for _ in range(80):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).square().mean().backward()
            optimizer.step()
            meter.step()
        readings = meter.readings
        meter.close()
        return prepared, readings


def test_a_parameter_that_is_never_used_does_not_keep_adam_from_its_noise_scale(rank_pool: RankPool) -> None:
    for prepared, readings in rank_pool.run(2, _half_used):
        assert prepared, "the layers' squares travel in float64: nothing is to be compiled in a step"
        assert readings.headline == "preconditioned"
        assert readings.preconditioned is not None and readings.preconditioned.observations >= 25


class _RareHead(nn.Module):
    """A small head has a part in the loss of every tenth step only, from the 60th on."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 1), nn.Linear(3, 1)
        self.calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        out = self.trunk(rows)
        return out + self.head(rows[:, :3]) if self.calls > 60 and self.calls % 10 == 0 else out


def _rare_head(rank: int, world_size: int, store_address: str) -> list[NoiseReadings]:
    with process_group(rank, world_size, store_address):
        torch.manual_seed(0)
        model = DistributedDataParallel(_RareHead(), find_unused_parameters=True)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        meter = ddp.attach(model, batch_size=8, optimizer=optimizer, sample_every=1)
        generator, seen = torch.Generator().manual_seed(rank), []
        for _ in range(140):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            meter.step()
            seen.append(meter.readings)
        meter.close()
        return seen


def test_a_parameter_that_is_used_late_and_rarely_does_not_freeze_adams_noise_scale(rank_pool: RankPool) -> None:
    for seen in rank_pool.run(2, _rare_head):
        observed = [0 if each.preconditioned is None else each.preconditioned.observations for each in seen]
        assert observed[-1] == 140 - 51, "every step since the 51st, one behind"
        parts = {(each.name, each.metric): each.reading.observations for each in seen[-1].parts}
        assert parts["trunk", "preconditioned"] == observed[-1]
        assert parts.get(("head", "preconditioned"), 0) == 0, "its second moments have not settled"
        assert parts["head", "plain"] == 7, "one behind"


def _regression(rank: int, world_size: int, store_address: str, backwards: int, steps: int) -> NoiseReadings:
    """Linear regression at fixed weights: 20 inputs, noise of 2, weights at the distance 1 of the truth."""
    with process_group(rank, world_size, store_address):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(20, 1, bias=False))
        truth = model.module.weight.detach()[0] + torch.nn.functional.normalize(torch.randn(20), dim=0)  # type: ignore[index]
        meter = ddp.attach(model, 16, "shared_memory", sample_every=1, layers=False)
        generator = torch.Generator().manual_seed(100 + rank)
        for _ in range(steps):
            model.zero_grad()
            for index in range(backwards):
                inputs = torch.randn(16, 20, generator=generator)
                targets = inputs @ truth + 2 * torch.randn(16, generator=generator)
                with contextlib.nullcontext() if index == backwards - 1 else model.no_sync():
                    (0.5 * (model(inputs)[:, 0] - targets).square().mean() / backwards).backward()
            meter.step()
        readings = meter.readings
        meter.close()
    return readings


@pytest.mark.parametrize("ranks, backwards", [(1, 8), (2, 4)])
def test_the_noise_scale_of_linear_regression(rank_pool: RankPool, ranks: int, backwards: int) -> None:
    """tr Sigma = (D + 1) |delta|^2 + D sigma^2 = 101 and |G|^2 = |delta|^2 = 1."""
    for readings in rank_pool.run(ranks, _regression, backwards, 402):
        reading = readings.plain
        assert readings.method == "micro_batches"
        assert reading.state == "resolved" and reading.low < 101 < reading.high
        assert reading.variance_trace == pytest.approx(101, rel=0.05)
