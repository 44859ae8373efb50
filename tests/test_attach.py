"""`ddp.attach` in scripts that know nothing else of the project."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import ddp
from ddp.errors import TransportError, UsageError
from ddp.noise.moments import Moments, unbiased_moments
from ddp.transport.base import BucketState
from ddp.transport.overlap import OverlappedTransport
from jobs import python, run_command
from ranks import RankPool, process_group

STEPS = 6
DECLARED = 8  # examples a forward, as `attach` is told
INPUTS = 7


def make_model(seed: int = 0, **options: Any) -> DistributedDataParallel:
    torch.manual_seed(seed)
    return DistributedDataParallel(nn.Sequential(nn.Linear(INPUTS, 11), nn.Tanh(), nn.Linear(11, 1)), **options)


def batch(rank: int, step: int, examples: int) -> Tensor:
    return torch.randn(examples, INPUTS + 1, generator=torch.Generator().manual_seed(97 * step + rank))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows[:, :INPUTS])[:, 0] - rows[:, INPUTS]).square().mean()


def gradient_of(module: nn.Module, rows: Tensor) -> Tensor:
    """In float64 and without DDP."""
    gradients = torch.autograd.grad(loss_of(module, rows), list(module.parameters()))
    return torch.cat([gradient.double().flatten() for gradient in gradients])


Use = tuple[str, tuple[int, ...]]  # how `meter.step` is called, and the examples of each rank
Seen = tuple[list[ddp.Reading], list[list[Tensor]], list[Tensor]]  # readings, units' gradients, weights after each step


def _train(
    rank: int, world_size: int, store_address: str, transport: str, overlap: bool, use: Use, options: dict[str, Any]
) -> Seen:
    how, examples = use
    readings, units, weights = [], [], []
    with process_group(rank, world_size, store_address):
        model = make_model(**options)
        optimizer = SGD(model.parameters(), lr=0.1)
        meter = ddp.attach(model, batch_size=DECLARED, transport=transport, overlap=overlap)
        assert meter.transport.name == transport and isinstance(meter.transport, OverlappedTransport) is overlap
        for step in range(STEPS):
            rows = batch(rank, step, examples[rank])
            units.append([gradient_of(model.module, part) for part in rows.chunk(2 if how == "accumulate" else 1)])
            optimizer.zero_grad()
            if how == "accumulate":  # two forwards, one step
                halves = rows.chunk(2)
                with model.no_sync():
                    (loss_of(model, halves[0]) / 2).backward()
                (loss_of(model, halves[1]) / 2).backward()
            else:
                loss_of(model, rows).backward()
            optimizer.step()
            with torch.no_grad():
                loss_of(model, rows)  # an evaluation, which does not count
            if how == "examples" or (how == "rank 0" and rank == 0):
                meter.step(examples=examples[rank])
            elif how == "accumulate":
                meter.step()
            readings.append(meter.reading)
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        meter.close()
    return readings, units, weights


def mean_moments(own: Sequence[Sequence[Tensor]], counts: tuple[int, ...]) -> list[Moments]:
    """The mean over the steps so far of each step's moments, by hand; the units have the same weight."""
    means: list[Moments] = []
    norms, traces = 0.0, 0.0
    for step, gradients in enumerate(zip(*own, strict=True), start=1):
        mean = torch.stack(gradients).mean(dim=0)
        moments = unbiased_moments(
            [float(each @ each) for each in gradients], counts, float(mean @ mean), [1.0] * len(counts)
        )
        assert moments is not None
        norms, traces = norms + moments.squared_norm, traces + moments.variance_trace
        means.append(Moments(norms / step, traces / step))
    return means


@pytest.mark.parametrize(
    ("transport", "overlap"), [("shared_memory", False), ("shared_memory", True), ("c10d", False), ("c10d", True)]
)
@pytest.mark.parametrize(
    "how, examples, counted",
    [
        ("examples", (3, 9, 14), (3, 9, 14)),
        ("accumulate", (16, 16), (DECLARED,) * 4),
        ("never", (5, 5), (DECLARED, DECLARED)),
        ("rank 0", (5, 6, 7), (5, DECLARED, DECLARED)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 0.00001, "gradient_as_bucket_view": True}], ids=["", "many"])
def test_a_reading_is_the_moments_of_the_ranks_gradients_one_step_later(
    rank_pool: RankPool,
    transport: str,
    overlap: bool,
    how: str,
    examples: tuple[int, ...],
    counted: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    seen = rank_pool.run(len(examples), _train, transport, overlap, (how, examples), options)
    own = [list(unit) for _, gradients, _ in seen for unit in zip(*gradients, strict=True)]
    expected = mean_moments(own, counted)
    for readings, _, weights in seen:
        assert readings[0].observations == 0
        for index, reading in enumerate(readings[1:]):
            assert reading.observations == index + 1
            assert reading.squared_norm == pytest.approx(expected[index].squared_norm, rel=1e-4)
            assert reading.variance_trace == pytest.approx(expected[index].variance_trace, rel=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(weights, seen[0][2], strict=True))
    step = torch.stack([gradients[1] for gradients in own]).mean(dim=0)
    taken = (seen[0][2][0] - seen[0][2][1]).double()
    assert torch.allclose(taken, 0.1 * step, rtol=1e-4, atol=1e-7)


def _two_models(rank: int, world_size: int, store_address: str) -> tuple[list[Any], list[Any]]:
    """Side by side, in turns, and then each one alone."""
    with process_group(rank, world_size, store_address):
        models = [make_model(seed) for seed in (1, 2)]
        meters = [ddp.attach(model, batch_size=DECLARED, transport="shared_memory") for model in models]
        own: list[list[Tensor]] = [[], []]
        for step in range(STEPS):
            for index in (0, 1) if step % 2 else (1, 0):
                rows = batch(rank + 10 * index, step, DECLARED)
                own[index].append(gradient_of(models[index].module, rows))
                models[index].zero_grad()
                loss_of(models[index], rows).backward()
        readings = [meter.step() for meter in meters]
        for meter in meters:
            meter.close()
    return readings, own


def test_two_models_at_once(rank_pool: RankPool) -> None:
    results = rank_pool.run(2, _two_models)
    for index in (0, 1):
        expected = mean_moments([own[index] for _, own in results], (DECLARED, DECLARED))[STEPS - 2]
        for readings, _ in results:
            assert readings[index].observations == STEPS - 1
            assert readings[index].variance_trace == pytest.approx(expected.variance_trace, rel=1e-4)


def _subgroup(rank: int, world_size: int, store_address: str, transport: str) -> tuple[Any, list[Tensor]]:
    """Ranks 0 and 2 train, rank 1 does not."""
    with process_group(rank, world_size, store_address):
        group = dist.new_group([0, 2])
        own: list[Tensor] = []
        reading = None
        if rank != 1:
            model = make_model(process_group=group)
            meter = ddp.attach(model, batch_size=DECLARED, transport=transport)
            for step in range(STEPS):
                rows = batch(rank, step, DECLARED)
                own.append(gradient_of(model.module, rows))
                model.zero_grad()
                loss_of(model, rows).backward()
            reading = meter.step()
            meter.close()
        dist.barrier()
    return reading, own


@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
def test_a_model_on_some_of_the_ranks(rank_pool: RankPool, transport: str) -> None:
    (first, own_0), (nothing, _), (third, own_2) = rank_pool.run(3, _subgroup, transport)
    assert nothing is None
    expected = mean_moments([own_0, own_2], (DECLARED, DECLARED))[STEPS - 2]
    for reading in (first, third):
        assert reading.squared_norm == pytest.approx(expected.squared_norm, rel=1e-4)


def _one_leaves(rank: int, world_size: int, store_address: str, overlap: bool) -> tuple[str, str, bool]:
    """Rank 1's meter is closed in the middle, as at the end of its process."""
    with process_group(rank, world_size, store_address, timeout=5.0):
        model = make_model(bucket_cap_mb=0.00001)
        optimizer = SGD(model.parameters(), lr=0.1)
        meter = ddp.attach(model, DECLARED, transport="shared_memory", timeout_seconds=5.0, overlap=overlap)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step, DECLARED)).backward()
            optimizer.step()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        if rank == 1:
            meter.close()
            dist.barrier()
            return "", "", True
        optimizer.zero_grad()
        loss_of(model, batch(rank, 3, DECLARED)).backward()
        raised = [_raised(optimizer.step), _raised(meter.step)]
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        dist.barrier()
        meter.close()
        return raised[0], raised[1], same


def _raised(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "thread"])
def test_a_lost_rank_is_raised_before_the_optimizer_takes_the_step(rank_pool: RankPool, overlap: bool) -> None:
    (before, after, same), _ = rank_pool.run(2, _one_leaves, overlap)
    assert re.fullmatch(r"PeerLostError: rank 1 \(pid \d+, host \S+\) left .*, in bucket 0 of backward 4", before), (
        before
    )
    assert after == before and same


def _raises_on_second_bucket(rank: int, world_size: int, store_address: str, overlap: bool) -> tuple[str, bool]:
    with process_group(rank, world_size, store_address, timeout=5.0):
        model = make_model(bucket_cap_mb=0.00001)
        optimizer = SGD(model.parameters(), lr=0.1)
        meter = ddp.attach(model, DECLARED, transport="shared_memory", timeout_seconds=5.0, overlap=overlap)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step, DECLARED)).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        inner = meter.transport._lane.inner if isinstance(meter.transport, OverlappedTransport) else meter.transport
        reduce, calls = inner.all_reduce_mean_, iter(range(100))

        def fail(bucket: Tensor, weight: float, state: BucketState | None = None) -> Any:
            if next(calls) == 1:
                raise TransportError("the cable is out")
            return reduce(bucket, weight, state)

        inner.all_reduce_mean_ = fail
        optimizer.zero_grad()
        loss_of(model, batch(rank, 3, DECLARED)).backward()
        try:
            optimizer.step()
            message = ""
        except TransportError as error:
            message = str(error)
        dist.barrier()
        meter.close()
        return message, all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "thread"])
def test_an_error_in_the_hook_is_itself_before_the_optimizer_takes_the_step(rank_pool: RankPool, overlap: bool) -> None:
    assert (
        rank_pool.run(2, _raises_on_second_bucket, overlap)
        == [("the cable is out, in bucket 1 of backward 4", True)] * 2
    )


def _train_on_after_close(rank: int, world_size: int, store_address: str, transport: str) -> tuple[str, bool]:
    with process_group(rank, world_size, store_address):
        model, other = make_model(), nn.Linear(2, 1)
        optimizer, unrelated = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
        meter = ddp.attach(model, batch_size=DECLARED, transport=transport)
        loss_of(model, batch(rank, 0, DECLARED)).backward()
        meter.close()
        meter.close()
        optimizer.step()  # of the gradient that was averaged before
        other(torch.ones(1, 2)).sum().backward()
        unrelated.step()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss_of(model, batch(rank, 1, DECLARED)).backward()
        with pytest.raises(UsageError) as caught:
            optimizer.step()
        unrelated.step()
        return str(caught.value), all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
def test_a_closed_meter_never_trains_on_unaveraged_gradients(rank_pool: RankPool, transport: str) -> None:
    for message, same in rank_pool.run(2, _train_on_after_close, transport):
        assert "meter of this model is closed" in message and same


def _refusals(rank: int, world_size: int, store_address: str) -> dict[str, str]:
    with process_group(rank, world_size, store_address):
        model = make_model()
        attempts: dict[str, Callable[[], object]] = {
            "not DDP": lambda: ddp.attach(model.module, batch_size=8),  # type: ignore[arg-type]
            "batch size": lambda: ddp.attach(model, batch_size=0),
            "transport": lambda: ddp.attach(model, batch_size=8, transport="shared_memry"),
            "wire": lambda: ddp.attach(model, batch_size=8, transport="c10d", wire="int8"),
            "format": lambda: ddp.attach(model, batch_size=8, wire="int4"),
            "population": lambda: ddp.attach(model, batch_size=8, population=15),
            "twice": lambda: ddp.attach(model, batch_size=8),
        }
        messages: dict[str, str] = {}
        for name, attempt in attempts.items():
            meter = ddp.attach(model, batch_size=8) if name == "twice" else None
            with pytest.raises(UsageError) as caught:
                attempt()
            messages[name] = str(caught.value)
            if meter is not None:
                with pytest.raises(UsageError, match="at least 0"):
                    loss_of(model, batch(rank, 0, 4)).backward()
                    meter.step(examples=-1)
                meter.close()
        return messages


def test_what_attach_refuses(rank_pool: RankPool) -> None:
    messages, other = rank_pool.run(2, _refusals)
    assert messages == other
    assert "Sequential" in messages["not DDP"] and "DistributedDataParallel(model)" in messages["not DDP"]
    assert "batch_size=0" in messages["batch size"]
    assert "shared_memry" in messages["transport"] and "valid: auto, shared_memory," in messages["transport"]
    assert "population=15" in messages["population"] and "8 examples on each of 2 ranks" in messages["population"]
    assert "already has a communication hook" in messages["twice"]
    assert 'transport "c10d" sends gradients as they are' in messages["wire"]
    assert "'int4'" in messages["format"] and "gradient, bfloat16, float16, int8" in messages["format"]


def _attach_again(rank: int, world_size: int, store: str) -> int:
    """Descriptors that three refused calls leave open."""
    with process_group(rank, world_size, store):
        model = DistributedDataParallel(nn.Linear(3, 1))
        meter = ddp.attach(model, 4, transport="shared_memory")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(UsageError):
                ddp.attach(model, 4, transport="shared_memory")
        left = len(os.listdir("/proc/self/fd")) - before
        dist.barrier()
        meter.close()
        return left


def test_a_refused_attach_leaves_nothing_open(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, _attach_again) == [0, 0]


LINE = re.compile(r"step (\d+): loss ([\d.]+), noise scale (\S+) \[(\S+), (\S+)\] examples \((\w+)\)")


def test_the_example_under_torchrun(tmp_path: Path) -> None:
    """At step 50 the window holds steps 25 to 49, at which the noise scale is known.

    With z = (x, 1), z.z of mean D + 1, and the weights' distance delta from the truth, an example's gradient
    z (z.delta - sigma epsilon) has the mean delta and, for a small part b of delta in the bias, the variance
    (D + 2) |delta|^2 - 2 b^2 + (D + 1) sigma^2. Gradient descent takes delta to (1 - 2 * 0.01) delta.
    """
    script = Path(__file__).parents[1] / "examples" / "attach.py"
    ended = run_command(python("-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)), tmp_path)
    assert ended.code == 0, ended.stderr
    found = {int(match[1]): match for match in LINE.finditer(ended.stdout)}
    assert sorted(found) == [50, 100, 150, 200, 250, 300], ended.stdout
    torch.manual_seed(0)
    distance = -torch.randn(20, 1).flatten()
    layer = nn.Linear(20, 1)
    weights, bias = float((layer.weight.detach() + distance).square().sum()), float(layer.bias.detach().square())
    shrink = sum(0.98 ** (2 * step) for step in range(24, 49)) / 25
    norm = shrink * (weights + bias)
    truth = (22 * shrink * weights + 20 * shrink * bias + 21 * 2.0**2) / norm
    assert 32 < truth < 40  # nearly twice the number of inputs
    point, low, high = (float(found[50][group]) for group in (3, 4, 5))
    assert found[50][6] == "resolved"
    assert abs(point - truth) < 3 * (high - low) / 4  # the interval is four standard errors wide
    assert float(found[100][4]) > high  # the gradient vanishes and its noise stays
    assert all(2 < float(match[2]) < 8 for step, match in found.items() if step > 50)  # towards sigma^2
    assert not list(tmp_path.iterdir())
