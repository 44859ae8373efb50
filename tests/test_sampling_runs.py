"""Whole runs that sample by class or by loss, or read a stream: against a plain loop, resumed, with workers, and their noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ddp.job import Job, SamplingSection
from ddp.tasks.base import Goal, TensorExamples
from ddp.training.data import BatchPlan, split
from ddp.training.sampling import draw, mixed
from ranks import RankPool
from test_known_noise_scales import within_three_standard_errors
from training_runs import differences, job, losses_of, saved, train_ranks

EXAMPLES, INPUTS, SEED = 64, 5, 0


class Regression:
    """Linear regression with classes of 46, 10 and 8; its data by number, or as a stream of one kind or another."""

    goals: Mapping[str, Goal] = {"error": "min"}

    def __init__(self, stream: str = "") -> None:
        self.stream = stream

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 1))

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(EXAMPLES, INPUTS, generator=generator)
        targets = inputs.sum(dim=1) + 2 * torch.randn(EXAMPLES, generator=generator)
        labels = torch.tensor([0] * 46 + [4] * 10 + [9] * 8)
        data = TensorExamples(inputs, targets, labels)
        kinds = {"": lambda _: data, "plain": Rows, "stateful": StatefulRows, "sharded": ShardedRows}
        return kinds[self.stream](data), Rows(data) if self.stream else data

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]).square()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"error": self.loss(model, batch)}


class Rows(IterableDataset[tuple[Tensor, ...]]):
    """The examples in their order."""

    def __init__(self, data: TensorExamples, first: int = 0, stride: int = 1) -> None:
        self.data, self.first, self.stride = data, first, stride

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in range(self.first, len(self.data), self.stride):
            yield self.data[index]


class StatefulRows(Rows):
    """With a place of its own."""

    at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        indices = range(self.first, len(self.data), self.stride)
        while self.at < len(indices):
            self.at += 1
            yield self.data[indices[self.at - 1]]


class ShardedRows(StatefulRows):
    """Each rank has a part of its own."""

    def shard(self, num_shards: int, index: int) -> StatefulRows:
        return StatefulRows(self.data, index, num_shards)


def regression(folder: Path, **settings: Any) -> Job:
    task = {"task__name": "test_sampling_runs:Regression", "evaluation__metric": "error", "micro_batch_size": 3}
    return job(folder, **{**task, **settings})


def plain_loop(section: SamplingSection, steps: int, batch: int = 12) -> tuple[nn.Module, list[float]]:
    """One process, whole batches: parameters and each step's loss."""
    torch.manual_seed(SEED)
    task = Regression()
    model, data = task.model().double(), task.datasets()[0]
    assert isinstance(data, TensorExamples)
    latest, losses_taken = np.full(EXAMPLES, np.nan), list[float]()
    layout, epoch = BatchPlan(EXAMPLES, batch, batch, 1, SEED), 0
    while len(losses_taken) < steps:
        probabilities = mixed(latest, section.uniform_share)
        if section.name == "class_balanced":
            counts = {0: 46, 4: 10, 9: 8}
            probabilities = np.array([1 / (3 * counts[label]) for label in data.tensors[2].tolist()])
        order = draw(probabilities, SEED, epoch)
        for position in layout.positions():
            indices = order[layout.batch(position).start : layout.batch(position).stop]
            inputs, targets, labels = data.__getitems__(indices.tolist())
            losses = task.loss(model, (inputs.double(), targets.double(), labels))
            for index, loss in zip(indices, losses.tolist(), strict=True):
                latest[index] = loss
            weights = 1 / (EXAMPLES * probabilities[indices]) if section.correct_bias else np.ones(len(indices))
            mean = (losses * torch.from_numpy(weights)).mean()
            losses_taken.append(mean.item())
            gradients = torch.autograd.grad(mean, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.sub_(0.05 * gradient)
            if len(losses_taken) == steps:
                break
        epoch += 1
    return model, losses_taken


@pytest.mark.parametrize(
    "sampling, world_sizes",
    [
        ({"name": "class_balanced"}, (3,)),
        ({"name": "loss_weighted", "uniform_share": 0.3}, (1, 2)),
        ({"name": "loss_weighted", "correct_bias": True}, (4,)),
    ],
)
def test_a_run_is_the_plain_loop_whatever_the_ranks(
    rank_pool: RankPool, tmp_path: Path, sampling: dict[str, Any], world_sizes: tuple[int, ...]
) -> None:
    """Epochs of five steps of 12 examples and one of 4."""
    settings = {f"sampling__{key}": value for key, value in sampling.items()}
    model, losses = plain_loop(SamplingSection(**sampling), 20)
    for world_size in world_sizes:
        folder = tmp_path / str(world_size)
        ended = train_ranks(rank_pool, world_size, regression(folder, **settings))
        assert {one.message for one in ended} == {""}
        np.testing.assert_allclose(losses_of(folder / "run"), losses, rtol=2e-4)
        state = saved(folder / "run", 20, world_size)
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(state["shared"]["parameters"][name], parameter.detach(), rtol=2e-3, atol=2e-4)
        named = {"loss_weighted": "the loss-weighted distribution", "class_balanced": "the class-balanced distribution"}
        expected = "loss-weighted draws whose bias" if "correct_bias" in sampling else named[sampling["name"]]
        assert expected in ended[0].printed


@pytest.mark.parametrize("name, workers", [("class_balanced", 2), ("loss_weighted", 0), ("loss_weighted", 2)])
def test_resumed_it_is_the_same_run(rank_pool: RankPool, tmp_path: Path, name: str, workers: int) -> None:
    """Stopped in the middle of the second epoch, at its end, and with workers in one run and none in the other."""
    settings = {"sampling__name": name, "run__steps": 20}
    train_ranks(rank_pool, 2, regression(tmp_path / "whole", **settings))
    for steps in (8, 12, 20):
        part = regression(tmp_path, **{**settings, "run__steps": steps, "data__workers": workers})
        ended = train_ranks(rank_pool, 2, part, resume="auto")
        assert {one.message for one in ended} == {""}
    whole = tmp_path / "whole" / "run"
    assert losses_of(tmp_path / "run") == losses_of(whole)
    assert differences(saved(tmp_path / "run", 20, 2), saved(whole, 20, 2)) == []


def test_with_another_number_of_ranks_it_goes_on_with_the_same_draws(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {"sampling__name": "loss_weighted", "optimizer__learning_rate": 0.01}
    train_ranks(rank_pool, 1, regression(tmp_path / "whole", **settings))
    for world_size, steps in ((4, 8), (1, 9), (3, 20)):
        ended = train_ranks(rank_pool, world_size, regression(tmp_path, **settings, run__steps=steps), resume="auto")
        assert {one.message for one in ended} == {""}
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(tmp_path / "whole" / "run"), rtol=1e-3)
    checkpoint = str(next((tmp_path / "run" / "checkpoints").glob("step-00000020*")))
    other = regression(tmp_path, **settings, run__id="branch", sampling__uniform_share=0.7, run__steps=30)
    ended = train_ranks(rank_pool, 3, other, resume=checkpoint)
    assert "uniform_share = 0.2, here 0.7" in ended[0].message
    ended = train_ranks(rank_pool, 3, regression(tmp_path, run__id="uniform", run__steps=30), resume=checkpoint)
    assert "sampling is uniform, in the middle of an epoch whose sampling was loss_weighted" in ended[0].message


def test_uphill_losses_are_no_examples_losses(rank_pool: RankPool, tmp_path: Path) -> None:
    """Sharpness-aware steps run the model twice; what is remembered of an example is its loss at the weights."""
    settings = {"sampling__name": "loss_weighted", "run__steps": 1, "optimizer__learning_rate": 1e-3}
    for name, more in (("plain", {}), ("uphill", {"optimizer__sam_rho": 0.5})):
        ended = train_ranks(rank_pool, 2, regression(tmp_path, **settings, **more, run__id=name))
        assert {one.message for one in ended} == {""}
    plain, uphill = (saved(tmp_path / name, 1, 2)["shared"]["sampling"] for name in ("plain", "uphill"))
    assert torch.equal(plain["here"], uphill["here"]) and torch.isfinite(plain["here"]).sum() == 12


def gradients_of(model_state: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each example's gradient at these weights, shape (examples, parameters), and its loss."""
    task = Regression()
    model, data = task.model(), task.datasets()[0]
    assert isinstance(data, TensorExamples)
    model.load_state_dict(dict(model_state))
    model.double()
    rows, losses = list[NDArray[np.float64]](), list[float]()
    for index in range(EXAMPLES):
        inputs, target, label = data.__getitems__([index])
        (loss,) = task.loss(model, (inputs.double(), target.double(), label))
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]).numpy())
        losses.append(loss.item())
    return np.array(rows), np.array(losses)


@pytest.mark.parametrize(
    "name, correct_bias", [("class_balanced", False), ("loss_weighted", False), ("loss_weighted", True)]
)
def test_the_noise_scale_is_that_of_the_sampled_distribution(
    rank_pool: RankPool, tmp_path: Path, name: str, correct_bias: bool
) -> None:
    """At weights that stand still, against the moments of w_i g_i under p, enumerated; a third of the set a step."""
    still = {"optimizer__learning_rate": 1e-12, "noise_scale__sample_every": 1, "run__steps": 400}
    settings = {"sampling__name": name, "global_batch_size": 20, "micro_batch_size": 5}
    settings |= {"sampling__uniform_share": 0.5} if name == "loss_weighted" else {}
    settings |= {"sampling__correct_bias": True} if correct_bias else {}
    ended = train_ranks(rank_pool, 2, regression(tmp_path, **still, **settings))
    assert {one.message for one in ended} == {""}
    state = saved(tmp_path / "run", 400, 2)["shared"]
    gradients, losses = gradients_of(state["parameters"])
    probabilities = mixed(losses, 0.5)
    if name == "class_balanced":
        probabilities = np.repeat([1 / (3 * 46), 1 / (3 * 10), 1 / (3 * 8)], [46, 10, 8])
    else:
        latest = state["sampling"]["latest"].numpy()
        seen = np.isfinite(latest)
        assert seen.sum() >= EXAMPLES - 2
        np.testing.assert_allclose(latest[seen], losses[seen], rtol=1e-4)
    weighted = gradients / (EXAMPLES * probabilities[:, None]) if correct_bias else gradients
    mean = probabilities @ weighted
    trace = probabilities @ np.square(weighted).sum(axis=1) - mean @ mean
    if correct_bias:
        np.testing.assert_allclose(mean, gradients.mean(axis=0), rtol=1e-9)
    window = state["noise_scale"]["whole"]["plain"]
    found = np.array([np.frombuffer(window["variance_trace"]), np.frombuffer(window["squared_norm"])])[
        :, 60:
    ]  # until then not all losses are known
    within_three_standard_errors(found, (float(trace), float(mean @ mean)))


def test_copies_of_a_hard_example_raise_no_alarm(rank_pool: RankPool, tmp_path: Path, caplog: Any) -> None:
    """Two ranks with the same few examples again and again: draws with replacement, not copies of a shard."""
    settings = {"sampling__name": "loss_weighted", "sampling__uniform_share": 0.01, "run__steps": 150}
    settings |= {"global_batch_size": 2, "micro_batch_size": 1, "optimizer__learning_rate": 1e-3}
    ended = train_ranks(rank_pool, 2, regression(tmp_path, **settings))
    assert {one.message for one in ended} == {""}
    assert saved(tmp_path / "run", 150, 2)["shared"]["shards"]["named"] == [False, False]


@pytest.mark.parametrize("kind, buffer", [("plain", 0), ("plain", 8), ("stateful", 0), ("sharded", 5)])
def test_a_stream_goes_on_where_it_was(rank_pool: RankPool, tmp_path: Path, kind: str, buffer: int) -> None:
    """64 examples: a pass is five steps of 12 and one of 4. The first run ends in the first pass, then two in the second."""
    settings = {"task__options": {"stream": kind}, "sampling__shuffle_buffer": buffer, "run__steps": 20}
    train_ranks(rank_pool, 2, regression(tmp_path / "whole", **settings))
    for steps in (3, 8, 20):
        ended = train_ranks(rank_pool, 2, regression(tmp_path, **{**settings, "run__steps": steps}), resume="auto")
        assert {one.message for one in ended} == {""}
    whole = tmp_path / "whole" / "run"
    assert len(losses_of(whole)) == 20 and losses_of(tmp_path / "run") == losses_of(whole)
    assert differences(saved(tmp_path / "run", 20, 2), saved(whole, 20, 2)) == []
    if (kind, buffer) != ("plain", 8):
        return
    for world_size, steps in ((3, 25), (1, 30)):
        ended = train_ranks(
            rank_pool, world_size, regression(tmp_path, **{**settings, "run__steps": steps}), resume="auto"
        )
        assert {one.message for one in ended} == {""}
    train_ranks(rank_pool, 2, regression(tmp_path / "whole", **{**settings, "run__steps": 30}), resume="auto")
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(whole), rtol=2e-3)


def test_a_stream_is_the_plain_loop_over_its_examples(rank_pool: RankPool, tmp_path: Path) -> None:
    """Three ranks, accumulating: steps of 12, the sixth of 4, then from the beginning."""
    ended = train_ranks(rank_pool, 3, regression(tmp_path, task__options={"stream": "plain"}))
    assert {one.message for one in ended} == {""}
    torch.manual_seed(SEED)
    task = Regression()
    model, data = task.model().double(), task.datasets()[0]
    assert isinstance(data, TensorExamples)
    batches = [*split(range(60), 5), range(60, 64)]
    losses: list[float] = []
    for step in range(20):
        inputs, targets, labels = data.__getitems__(list(batches[step % 6]))
        loss = task.loss(model, (inputs.double(), targets.double(), labels)).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(0.05 * gradient)
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses, rtol=2e-4)


@pytest.mark.parametrize(
    "stream, settings, words",
    [
        ("plain", {"run__epochs": 2, "run__steps": None}, "run.epochs: the training set is a stream that does not say"),
        (
            "plain",
            {"schedule__warmup_epochs": 0.5},
            "schedule.warmup_epochs: the training set is a stream that does not",
        ),
        ("plain", {"data__workers": 1}, "data.workers: a training set that is a stream"),
        ("plain", {"sampling__name": "class_balanced"}, 'sampling.name: "class_balanced" chooses examples by number'),
        ("plain", {"global_batch_size": "auto"}, "batch.largest: the training set is a stream of unknown length"),
        ("", {"sampling__shuffle_buffer": 5}, "sampling.shuffle_buffer is for a training set that is a stream"),
    ],
)
def test_what_does_not_go_together(
    rank_pool: RankPool, tmp_path: Path, stream: str, settings: dict[str, Any], words: str
) -> None:
    ended = train_ranks(rank_pool, 2, regression(tmp_path, task__options={"stream": stream}, **settings))
    assert {one.kind for one in ended} == {"UsageError"}
    assert all(words in one.message for one in ended), ended
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("example, options", [("dictionary", {"examples": 400}), ("streaming", {})])
def test_the_examples_train(rank_pool: RankPool, tmp_path: Path, example: str, options: dict[str, Any]) -> None:
    name = {"dictionary": "dictionary_task:MostFrequentLetter", "streaming": "streaming_task:EndlessSpirals"}[example]
    settings: dict[str, Any] = {
        "task__name": f"examples.{name}",
        "task__options": options,
        "evaluation__metric": "accuracy",
    }
    settings |= {"optimizer__name": "adamw", "optimizer__learning_rate": 1e-2, "run__steps": 60, "micro_batch_size": 8}
    settings |= {"global_batch_size": 32}
    settings |= {"sampling__name": "class_balanced", "data__workers": 1} if example == "dictionary" else {}
    ended = train_ranks(rank_pool, 2, job(tmp_path, **settings))
    assert {one.message for one in ended} == {""}
    losses = losses_of(tmp_path / "run")
    assert all(map(np.isfinite, losses)) and sum(losses[-20:]) < sum(losses[:20])
