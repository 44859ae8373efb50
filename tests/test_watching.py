"""A look at a step's layers against plain loops over what all ranks gathered, on one to three ranks and odd models."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ddp.job import WatchingSection
from ddp.telemetry.records import LayersRecord
from ddp.telemetry.sinks import Sinks
from ddp.training.evaluation import averaged_buffers
from ddp.training.watching import LayerWatch
from ddp.training.watching.first_layer import first_layer, weight_pictures
from ddp.watching.histogram import Histogram, edges
from ddp.watching.layers import LayerStatistics
from ranks import RankPool, process_group

CPU = torch.device("cpu")
STEPS, MICRO_BATCHES = 4, 2


class Kept:
    """A sink that keeps looks."""

    def __init__(self) -> None:
        self.looks: list[LayersRecord] = []

    def layers(self, record: LayersRecord) -> None:
        self.looks.append(record)


class Mixed(nn.Module):
    """Embedding, attention, BatchNorm, one layer and one ReLU called twice, a frozen layer that saturates its tanh, dead units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.shared, self.relu = nn.Linear(8, 8), nn.ReLU()
        self.frozen, self.tanh = nn.Linear(8, 8), nn.Tanh()
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.shared.bias[:3] = -100.0
            self.frozen.weight[:5] *= 0.0
            self.frozen.bias[:5] = 9.0
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self.norm(self.attention(hidden, hidden, hidden)[0].mean(dim=1))
        hidden = self.relu(self.shared(self.relu(self.shared(hidden))))
        return self.head(self.tanh(self.frozen(hidden)))


def sinks_of(kept: Kept) -> Sinks:
    return Sinks([cast(Any, kept)])


@contextmanager
def _capturing(module: nn.Module, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """What each module puts out, call by call; independent of the hooks under test."""

    def keep(name: str, output: Any) -> None:
        outputs.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).detach().clone())

    with ExitStack() as stack:
        for name, each in module.named_modules():
            if name and not name.endswith("out_proj"):
                handle = each.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
                stack.callback(handle.remove)
        yield


def look_on_rank(rank: int, world_size: int, store_address: str, bins_per_octave: int) -> dict[str, Any]:
    """Steps 1, 2 and 4 are watched. What rank 0 was told, and what a plain loop says."""
    with process_group(rank, world_size, store_address):
        torch.manual_seed(0)
        module = Mixed()
        model = DistributedDataParallel(module)
        optimizer = torch.optim.Adam((each for each in module.parameters() if each.requires_grad), lr=0.01)
        section = WatchingSection(every=2, bins_per_octave=cast(Any, bins_per_octave))
        watch = LayerWatch(section, model, rank=rank, world_size=world_size, device=CPU)
        torch.manual_seed(1 + rank)
        kept, plain, collectives, hooks = Kept(), list[dict[str, Any]](), list[int](), list[int]()
        for step in range(1, STEPS + 1):
            outputs: dict[str, list[Tensor]] = {}
            with _capturing(module, outputs), _counting(collectives):
                wanted = watch.wants(step)
                if wanted:
                    watch.before_forward(step)
                hooks.append(sum(len(each._forward_hooks) for each in module.modules()))
                for number in range(MICRO_BATCHES):
                    with model.no_sync() if number == 0 else nullcontext():
                        tokens = torch.randint(11, (20 + 3 * rank, 4))
                        model(tokens).square().mean().backward()
                before = {name: each.detach().clone() for name, each in module.named_parameters()}
                if wanted:
                    watch.before_update(step)
                gradients = {
                    name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None
                }
                optimizer.step()
                if wanted:
                    watch.after_update(step, sinks_of(kept) if rank == 0 else Sinks())
            moved = {name: each.detach() - before[name] for name, each in module.named_parameters()}
            plain.append({"before": before, "moved": moved, "gradients": gradients, "outputs": _gathered(outputs)})
            optimizer.zero_grad()
        return {"looks": kept.looks, "plain": plain, "collectives": collectives, "hooks": hooks}


@contextmanager
def _counting(counts: list[int]) -> Iterator[None]:
    original, count = dist.all_reduce, 0

    def counted(*args: Any, **how: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **how)

    dist.all_reduce = counted
    try:
        yield
    finally:
        dist.all_reduce = original
        counts.append(count)


def _gathered(outputs: dict[str, list[Tensor]]) -> list[dict[str, list[np.ndarray]]]:
    own = {name: [each.numpy() for each in calls] for name, calls in outputs.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def counted(values: np.ndarray, bins_per_octave: int) -> tuple[int, ...]:
    """A value on an edge, which sums of a few products may hit, belongs to the bin farther from zero."""
    at = edges(bins_per_octave)
    place = np.where(values >= 0, np.digitize(values, at) - 1, np.digitize(values, at, right=True) - 1)
    return tuple(np.bincount(place.ravel(), minlength=len(at) - 1).tolist())


@pytest.mark.parametrize(("world_size", "bins_per_octave"), [(1, 1), (2, 4), (3, 2)])
def test_a_look_is_what_plain_loops_say(rank_pool: RankPool, world_size: int, bins_per_octave: int) -> None:
    found = rank_pool.run(world_size, look_on_rank, bins_per_octave)
    looks: list[LayersRecord] = found[0]["looks"]
    assert [look.step for look in looks] == [1, 2, 4]
    for look in looks:
        plain = found[0]["plain"][look.step - 1]
        layers = {layer.name: layer for layer in look.layers}
        _check_weights(layers, plain, bins_per_octave)
        _check_outputs(layers, plain["outputs"], bins_per_octave)
    for each in found:
        own = 8  # hooks of the test's own
        assert each["hooks"][2] == own < each["hooks"][0] == each["hooks"][1] == each["hooks"][3]
        assert each["collectives"] == ([0, 0, 0, 0] if world_size == 1 else [2, 1, 0, 1])  # the first agrees on units


def _check_weights(layers: dict[str, LayerStatistics], plain: dict[str, Any], bins_per_octave: int) -> None:
    members: dict[str, list[str]] = {}
    for name in plain["gradients"]:
        members.setdefault(name.rpartition(".")[0], []).append(name)
    assert {name for name, layer in layers.items() if not math.isnan(layer.update_norm)} == set(members)
    for layer, names in members.items():
        weights, moved, gradients = (
            torch.cat([plain[what][name].flatten().double() for name in names])
            for what in ("before", "moved", "gradients")
        )
        seen = layers[layer]
        assert seen.update_ratio == pytest.approx(float(moved.norm() / weights.norm()), rel=1e-5)
        assert seen.gradient_norm == pytest.approx(float(gradients.norm()), rel=1e-5)
        assert seen.gradients is not None and seen.gradients.counts == counted(gradients.numpy(), bins_per_octave)


def _check_outputs(
    layers: dict[str, LayerStatistics], outputs: list[dict[str, list[np.ndarray]]], bins_per_octave: int
) -> None:
    def everything(name: str, first: int = 0, every: int = 1) -> np.ndarray:
        return np.concatenate([call for rank in outputs for call in rank[name][first::every]])

    values = {name: everything(name) for name in ("embed", "attention", "norm", "shared", "frozen", "tanh", "head")}
    values |= {"relu": everything("relu", 0, 2), "relu (call 2)": everything("relu", 1, 2)}
    assert list(layers)[:5] == ["embed", "attention", "norm", "shared", "relu"]
    for name, expected in values.items():
        seen = layers[name]
        assert seen.activations is not None and seen.activations.counts == counted(expected, bins_per_octave)
        assert seen.activation_mean == pytest.approx(expected.mean(), rel=1e-4, abs=1e-6)
        assert seen.activation_std == pytest.approx(expected.std(), rel=1e-4)
    for name in ("relu", "relu (call 2)"):
        assert (layers[name].units, layers[name].after) == (8, "shared")
        assert layers[name].dead_units == int((values[name] == 0).all(axis=0).sum()) >= 3
    assert layers["tanh"].saturated_units == 5 and layers["tanh"].units == 8
    assert layers["head"].is_output and not layers["tanh"].is_output


def step_once(model: nn.Module, inputs: Tensor, section: WatchingSection | None = None) -> LayersRecord:
    """One watched step in this process."""
    kept, watch = Kept(), LayerWatch(section or WatchingSection(every=1), model, rank=0, world_size=1, device=CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert watch.wants(1)
    watch.before_forward(1)
    model(inputs).float().square().mean().backward()
    watch.before_update(1)
    optimizer.step()
    watch.after_update(1, sinks_of(kept))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    (look,) = kept.looks
    return look


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_narrow_and_wide_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to(dtype)
    before = [each.detach().double().clone() for each in model[0].parameters()]
    look = step_once(model, torch.randn(128, 4).to(dtype))
    moved = [now.detach().double() - then for now, then in zip(model[0].parameters(), before, strict=True)]
    expected = math.sqrt(
        sum(float(each.square().sum()) for each in moved) / sum(float(e.square().sum()) for e in before)
    )
    assert look.layers[0].update_ratio == pytest.approx(expected, rel=1e-5)
    assert look.layers[1].activations is not None and look.layers[1].activations.total == 128 * 6


def test_what_is_computed_again_is_counted_once() -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU())

        def forward(self, inputs: Tensor) -> Tensor:
            return cast(Tensor, checkpoint(self.inner, inputs, use_reentrant=False))

    look = step_once(Recomputing(), torch.randn(7, 4))
    assert [layer.activations.total for layer in look.layers if layer.activations] == [42, 42]


def test_a_function_in_place_of_a_module_is_seen_where_it_goes_in() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            with torch.no_grad():
                self.first.bias[:4] = -100.0

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(inputs)))

    layers = {layer.name: layer for layer in step_once(Functional(), torch.randn(128, 4).abs()).layers}
    assert layers["input of last"].dead_units == 4 and layers["input of last"].after == "first"
    assert "input of first" not in layers  # that is data


def test_a_compiled_model_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    model.compile(backend="eager")
    with caplog.at_level(logging.WARNING, logger="ddp.training"):
        look = step_once(model, torch.randn(7, 4))
    assert [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert [layer.name for layer in look.layers] == ["0"] and look.layers[0].update_ratio > 0
    assert look.layers[0].activations is None


def test_a_step_that_is_not_taken_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    watch = LayerWatch(WatchingSection(every=2), model, rank=0, world_size=1, device=CPU)
    assert watch.wants(2)
    watch.before_forward(2)
    model(torch.randn(3, 4))
    copied = averaged_buffers(model, world_size=1)  # an evaluation that is due then
    assert copied(torch.randn(3, 4)).shape == (3, 2)
    assert not watch.wants(3)
    assert not any(each._forward_hooks for each in model.modules())


def test_what_is_switched_off_is_not_there() -> None:
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].requires_grad_(False)
    section = WatchingSection(every=1, activations=False, gradients=False, pictures=False)
    (layer,) = step_once(model, torch.randn(3, 9), section).layers
    assert (layer.name, layer.activations, layer.gradients) == ("0", None, None) and layer.update_ratio > 0


def test_not_finite_outputs_are_counted_apart() -> None:
    layer = step_once(nn.Linear(2, 2), torch.tensor([[math.inf, 1.0], [1.0, 1.0]])).layers[0]
    assert layer.activations == Histogram(1, layer.activations.counts, 2) if layer.activations else False
    assert math.isnan(layer.activation_std)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 70, 5), nn.ReLU()), (64, 3, 5, 5)),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), (10, 1, 8, 8)),
        (nn.Sequential(nn.Conv2d(2, 4, 3)), (4, 1, 3, 3)),
        (nn.Sequential(nn.Linear(192, 10)), (10, 3, 8, 8)),
        (nn.Sequential(nn.Linear(10, 10)), None),
        (nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), None),
        (nn.ReLU(), None),
    ],
)
def test_pictures_of_the_first_layer(model: nn.Module, shape: tuple[int, ...] | None) -> None:
    found = first_layer(model)
    pictures = None if found is None else weight_pictures(*found)
    assert (None if pictures is None else pictures.shape) == shape
    if pictures is not None and found is not None:
        weight = cast(Tensor, found[1].weight).detach().reshape(pictures.total, -1, *pictures.shape[2:])
        expected = weight[: pictures.shape[0], : pictures.shape[1]].numpy()
        np.testing.assert_array_equal(np.frombuffer(pictures.values, "<f4").reshape(pictures.shape), expected)
