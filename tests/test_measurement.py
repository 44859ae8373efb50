"""The trainer's noise scales through real ranks, against per-example gradients enumerated in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp.noise.moments import unbiased_moments
from ddp.tasks.base import Goal, TensorExamples
from ddp.training.data import BatchPlan, split
from ranks import RankPool
from test_resume import train_one_listening
from training_runs import INPUTS, job, saved, steps_of, train_ranks

EXAMPLES, BATCH, MICRO = 66, 22, 3  # three steps an epoch; eight units of 2 or 3 examples a step, in any layout
STEPS = 56  # the last six with Adam's second moments 50 steps old
BETA, EPSILON, SEED = 0.97, 1e-3, 4
Series = NDArray[np.float64]  # shape (2, observations): tr(Sigma), |G|^2


class Float64Net:
    """A small network in float64, one row of inputs an example; the targets are noisy sums.

    With `copies`, ranks get the same inputs: new ones in each step, whatever the trainer deals out.
    """

    goals: Mapping[str, Goal] = {}

    def __init__(self, batch_norm: bool = False, copies: bool = False) -> None:
        self.batch_norm, self.copies = batch_norm, copies
        self.calls = 0

    def model(self) -> nn.Module:
        normalisation = [nn.BatchNorm1d(3)] if self.batch_norm else []
        return nn.Sequential(nn.Linear(INPUTS, 3), *normalisation, nn.Tanh(), nn.Linear(3, 1)).double()

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        generator = torch.Generator().manual_seed(8)
        inputs = torch.randn(EXAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        noise = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
        examples = TensorExamples(inputs, inputs.sum(dim=1) + 2 * noise)
        return examples, examples

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        if self.copies:
            self.calls += 1
            inputs = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(self.calls), dtype=inputs.dtype)
            targets = inputs.sum(dim=1).square()
        return (model(inputs)[:, 0] - targets).square()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {}


def settings(optimizer: str, **more: Any) -> dict[str, Any]:
    """Weights stay where they are, but for 1e-12."""
    table: dict[str, Any] = {
        "task__name": "test_measurement:Float64Net",
        "run__seed": SEED,
        "run__steps": STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": MICRO,
        "optimizer__name": optimizer,
        "optimizer__learning_rate": 1e-15,
        "noise_scale__sample_every": 1,
    }
    if optimizer != "sgd":
        table |= {"optimizer__betas": [0.5, BETA], "optimizer__epsilon": EPSILON}
    return table | more


def series(window: Mapping[str, Any]) -> Series:
    return np.array([np.frombuffer(window["variance_trace"]), np.frombuffer(window["squared_norm"])])


def observed(run_directory: Path, world_size: int, steps: int = STEPS) -> dict[tuple[str, str], Series]:
    """By part ("" for the whole model) and metric."""
    state = saved(run_directory, steps, world_size)["shared"]["noise_scale"]
    whole = {("", metric): series(window) for metric, window in state["whole"].items()}
    return whole | {(name, metric): series(window) for _, name, metric, window in state["parts"]}


def enumerated(parameters: Mapping[str, Tensor]) -> dict[tuple[str, str], Series]:
    """What `observed` should be: every example's gradient by itself, every unit's and Adam's moments by hand."""
    task = Float64Net()
    model = task.model()
    model.load_state_dict(dict(parameters))
    inputs, targets = task.datasets()[0].tensors  # type: ignore[attr-defined]
    gradients = np.stack([flat_gradient(model, task, inputs[i : i + 1], targets[i : i + 1]) for i in range(EXAMPLES)])
    parts = {"": slice(0, 22), "0": slice(0, 18), "2": slice(18, 22)}
    plan = BatchPlan(EXAMPLES, BATCH, MICRO, 1, SEED)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    second = np.zeros(22)
    for step in range(STEPS):
        epoch, place = divmod(step, 3)
        batch = gradients[plan.order(epoch)[place * BATCH : (place + 1) * BATCH]]
        preconditioner = 1 / (np.sqrt(second / max(1 - BETA**step, 1e-300)) + EPSILON)
        for (name, columns), metric in itertools.product(parts.items(), ("plain", "preconditioned")):
            if metric == "preconditioned" and step < 50:
                continue
            root = np.sqrt(preconditioner) if metric == "preconditioned" else np.ones(22)
            units = [(batch * root)[each.start : each.stop, columns] for each in split(range(BATCH), 8)]
            own = [float(np.square(unit.mean(axis=0)).sum()) for unit in units]
            whole = float(np.square((batch * root)[:, columns].mean(axis=0)).sum())
            moments = unbiased_moments(own, [len(unit) for unit in units], whole, population=EXAMPLES)
            assert moments is not None
            found.setdefault((name, metric), []).append((moments.variance_trace, moments.squared_norm))
        second = BETA * second + (1 - BETA) * batch.mean(axis=0) ** 2
    return {key: np.array(pairs).T for key, pairs in found.items()}


def flat_gradient(model: nn.Module, task: Float64Net, inputs: Tensor, targets: Tensor) -> NDArray[np.float64]:
    gradients = torch.autograd.grad(task.loss(model, (inputs, targets)).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients]).numpy()


@pytest.mark.parametrize(
    "world_size, optimizer, transport",
    [
        (1, "adam", "shared_memory"),
        (2, "adamw", "c10d"),
        (4, "adamw", "shared_memory"),
        (8, "adamw", "shared_memory"),
        (8, "sgd", "shared_memory"),
    ],
)
def test_any_layout_gives_the_enumerated_moments(
    rank_pool: RankPool, tmp_path: Path, world_size: int, optimizer: str, transport: str
) -> None:
    """1x8, 2x4, 4x2 and 8x1 ranks x micro-batches: the same units, whole and by layer, plain and preconditioned."""
    ended = train_ranks(
        rank_pool, world_size, job(tmp_path, **settings(optimizer, transport__name=transport)), timeout=90
    )
    assert {one.kind for one in ended} == {""}, ended
    found = observed(tmp_path / "run", world_size)
    wanted = enumerated(saved(tmp_path / "run", STEPS, world_size)["shared"]["parameters"])
    if optimizer == "sgd":
        wanted = {key: each for key, each in wanted.items() if key[1] == "plain"}
    assert found.keys() == wanted.keys()
    for key, expected in wanted.items():
        scale = np.abs(expected).max(axis=1, keepdims=True)
        assert found[key].shape == expected.shape
        assert found[key] / scale == pytest.approx(expected / scale, abs=1e-9), key
    last = steps_of(tmp_path / "run")[-1].noise
    assert last is not None and last.headline == ("plain" if optimizer == "sgd" else "preconditioned")
    assert last.method == ("ranks" if world_size == 8 else "micro_batches")


def test_a_change_of_the_number_of_ranks_goes_on_with_all_windows(rank_pool: RankPool, tmp_path: Path) -> None:
    """Four ranks, then two: what was observed stays bit for bit, and what comes is what one rank would have seen."""
    train_ranks(rank_pool, 4, job(tmp_path, **settings("adamw", run__steps=STEPS - 3)))
    before = observed(tmp_path / "run", 4, STEPS - 3)
    train_ranks(rank_pool, 2, job(tmp_path, **settings("adamw")), resume="auto")
    after = observed(tmp_path / "run", 2)
    train_ranks(rank_pool, 1, job(tmp_path / "alone", **settings("adamw")))
    alone = observed(tmp_path / "alone" / "run", 1)
    assert before.keys() == after.keys() == alone.keys() and len(after) == 6
    for key, series_of in after.items():
        kept = before[key].shape[1]
        assert series_of.shape[1] == kept + 3
        assert np.array_equal(series_of[:, :kept], before[key])
        assert series_of == pytest.approx(alone[key], rel=1e-9)


def test_unsampled_steps_have_the_ranks_as_units(rank_pool: RankPool, tmp_path: Path) -> None:
    train_ranks(rank_pool, 2, job(tmp_path, **settings("sgd", run__steps=9, noise_scale__sample_every=4)))
    noise = [record.noise for record in steps_of(tmp_path / "run")]
    assert [each.method for each in noise if each] == [*["ranks"] * 3, "micro_batches"] * 2 + ["ranks"]
    assert [each.plain.observations for each in noise if each] == list(range(1, 10))
    assert observed(tmp_path / "run", 2, 9)["0", "plain"].shape == (2, 2)


@pytest.mark.parametrize(
    "batch_norm, split, observations",
    [(False, "auto", 99 + 16), (True, "auto", 0), (True, True, 130), (False, False, 0)],
    ids=str,
)
def test_one_rank_without_accumulation_splits_its_batch(
    rank_pool: RankPool, tmp_path: Path, batch_norm: bool, split: Any, observations: int
) -> None:
    """As the step says and not the clock, or every step where that is asked for; with batch statistics only then."""
    alone = settings("sgd", run__steps=130, micro_batch_size=BATCH, noise_scale__sample_every="auto")
    alone |= {"noise_scale__split": split, "task__options": {"batch_norm": batch_norm}}
    train_ranks(rank_pool, 1, job(tmp_path, **alone))
    noise = [record.noise for record in steps_of(tmp_path / "run")]
    last = noise[129]  # from step 100 on every second
    assert last is not None and noise[-1] is not None
    assert noise[-1].plain.observations == observations
    assert last.method == ("split" if observations else "none")


def test_where_the_learning_rate_follows_the_noise_scale_no_clock_chooses_what_is_sampled(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    more = {"optimizer__learning_rate_rule": "noise_scale", "optimizer__tuned_batch_size": 2 * BATCH}
    train_ranks(
        rank_pool, 2, job(tmp_path, **settings("sgd", run__steps=900, noise_scale__sample_every="auto", **more))
    )
    noise = [record.noise for record in steps_of(tmp_path / "run")]
    sampled = [step for step, each in enumerate(noise, start=1) if each is not None and each.method == "micro_batches"]
    assert sampled[:99] == [*range(1, 100)]
    assert {later - one for one, later in pairwise(sampled) if one > 850} == {16}
    assert all(sampled[index - 25] > 0.55 * sampled[index] for index in range(100, len(sampled)))


def test_halves_are_units_of_the_same_gradient(rank_pool: RankPool, tmp_path: Path) -> None:
    alone = settings("sgd", run__steps=3, micro_batch_size=BATCH, noise_scale__split=True)
    train_ranks(rank_pool, 1, job(tmp_path, **alone))
    halves = observed(tmp_path / "run", 1, 3)
    train_ranks(rank_pool, 2, job(tmp_path / "two", **settings("sgd", run__steps=3, micro_batch_size=BATCH)))
    ranks = observed(tmp_path / "two" / "run", 2, 3)
    assert halves.keys() == ranks.keys() == {("", "plain"), ("0", "plain"), ("2", "plain")}
    for key, expected in ranks.items():
        assert halves[key] == pytest.approx(expected, rel=1e-9)


def test_faults_of_the_data_are_named_once_on_rank_zero(rank_pool: RankPool, tmp_path: Path) -> None:
    same = job(tmp_path, **settings("sgd", run__steps=40, task__options={"copies": True, "batch_norm": True}))
    (_, first), (_, second) = rank_pool.run(2, train_one_listening, [same] * 2, None)
    assert first.count("all ranks see the same data") == 1
    assert first.count("normalises by batch statistics") == 1
    assert second == ""
