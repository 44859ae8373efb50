"""Whole training runs on real ranks: the same numbers as a plain loop, and every way a run ends early."""

from __future__ import annotations

import itertools
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from ddp import errors
from ddp.job import DigitsSection, Job
from ddp.tasks.digits import CLASSES, IMAGE, DigitsTask
from ddp.tasks.networks import convolutional_network
from ddp.training.data import BatchPlan
from ddp.training.measuring import population
from ddp.training.run import hold
from ddp.training.signals import StopRequest
from ranks import RankPool
from training_runs import EXAMPLES, INPUTS, Misbehaving, differences, job, losses_of, saved, steps_of, train_ranks

SEED, TRAINING_EXAMPLES = 7, 1472
STEPS, CLIP = 20, 0.5
SGD_SETTINGS = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
ADAM_SETTINGS = {"name": "adamw", "learning_rate": 5e-3, "gradient_clip_norm": CLIP}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda parameters: AdamW(parameters, lr=5e-3, weight_decay=0.0),
}


def plain_loop(cuts: Iterable[int], steps: int, optimizer_name: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one process, the whole batch at once; `cuts` cut each epoch's order."""
    section = DigitsSection(name="digits", channels=4, batch_norm=False)
    images, labels = DigitsTask(section).datasets()[0].tensors
    torch.manual_seed(SEED)
    model = convolutional_network(section, IMAGE, CLASSES)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    plan = BatchPlan(TRAINING_EXAMPLES, TRAINING_EXAMPLES, TRAINING_EXAMPLES, 1, SEED)
    batches = (plan.order(epoch)[a:b] for epoch in itertools.count() for a, b in itertools.pairwise(cuts))
    losses, norms = [], []
    for batch in itertools.islice(batches, steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        limit = CLIP if optimizer_name == "adamw" else math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def digits(folder: Path, optimizer: str, **settings: object) -> Job:
    table = ADAM_SETTINGS if optimizer == "adamw" else SGD_SETTINGS
    return job(
        folder,
        task__name="digits",
        task__channels=4,
        task__batch_norm=False,
        run__seed=SEED,
        **{f"optimizer__{key}": value for key, value in table.items()},
        **settings,
    )


@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 64), (2, 32), (4, 16), (2, 16), (3, 64), (3, 5)], ids=str)
def test_the_losses_are_those_of_a_plain_loop(
    rank_pool: RankPool, tmp_path: Path, transport: str, world_size: int, micro_batch_size: int
) -> None:
    optimizer = "adamw" if transport == "c10d" else "sgd"
    here = digits(
        tmp_path, optimizer, global_batch_size=64, micro_batch_size=micro_batch_size, transport__name=transport
    )
    assert [ended.kind for ended in train_ranks(rank_pool, world_size, here)] == [""] * world_size
    losses, norms = plain_loop(range(0, TRAINING_EXAMPLES + 1, 64), STEPS, optimizer)
    assert losses[-1] < 0.95 * losses[0] and max(norms) > CLIP
    records = steps_of(tmp_path / "run")
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record.gradient_norm for record in records] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(
    "global_batch_size, world_size, cuts",
    [
        (250, 2, [*range(0, 1472, 250), 1472]),  # the last batch of an epoch holds 222 examples
        (210, 4, [*range(0, 1470 - 1, 210), 1472]),  # the last 2 of an epoch are too few for 4 ranks: a batch of 212
        (50, 3, [*range(0, 1472, 50), 1472]),
    ],
)
def test_the_losses_are_those_of_a_plain_loop_across_epochs(
    rank_pool: RankPool, tmp_path: Path, global_batch_size: int, world_size: int, cuts: list[int]
) -> None:
    here = digits(tmp_path, "sgd", global_batch_size=global_batch_size, micro_batch_size=43, run__epochs=2)
    assert {ended.kind for ended in train_ranks(rank_pool, world_size, here)} == {""}
    records = steps_of(tmp_path / "run")
    assert [record.examples for record in records] == 2 * np.diff(cuts).tolist()
    assert records[-1].examples_total == 2 * TRAINING_EXAMPLES
    assert records[-1].epoch == 2
    losses, _ = plain_loop(cuts, len(records), "sgd")
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-5)


def batch_with(example: int, global_batch_size: int, world_size: int) -> tuple[int, int]:
    """The step (1 for the first) and the rank that take `example` in the first epoch of `job`."""
    place = BatchPlan(EXAMPLES, EXAMPLES, EXAMPLES, 1, 0).order(0).tolist().index(example)
    step, within = divmod(place, global_batch_size)
    return step + 1, within * world_size // global_batch_size


def example_of(step: int, rank: int, global_batch_size: int, world_size: int) -> int:
    """Some example that `rank` takes in `step` of the first epoch."""
    found = (e for e in range(EXAMPLES) if batch_with(e, global_batch_size, world_size) == (step, rank))
    return next(found)


@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
@pytest.mark.parametrize("action, step, rank", [("nan_loss", 3, 1), ("nan_gradient", 2, 2), ("nan_loss", 1, 0)])
def test_all_ranks_diverge_in_the_step_of_the_bad_example(
    rank_pool: RankPool, tmp_path: Path, transport: str, action: str, step: int, rank: int
) -> None:
    example = example_of(step, rank, 12, 3)
    bad = {"task__options": {"action": action, "example": example}, "transport__name": transport}
    ended = train_ranks(rank_pool, 3, job(tmp_path, optimizer__momentum=0.9, **bad))
    assert {(one.kind, one.step, one.run_directory) for one in ended} == {("DivergedError", step, tmp_path / "run")}
    assert all(f"on rank {rank} in step {step} " in one.message for one in ended)
    assert len(losses_of(tmp_path / "run")) == step - 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    for one in ended:  # no rank has taken the step
        assert differences(one.parameters, parameters_after(rank_pool, tmp_path, step - 1, transport)) == []


def parameters_after(rank_pool: RankPool, folder: Path, steps: int, transport: str) -> list[torch.Tensor]:
    """What a run with a good task has after `steps`; 0 is the model as it was made."""
    if steps == 0:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
        return [parameter.detach() for parameter in model.parameters()]
    here = folder / f"good-{steps}"
    if not here.exists():
        train_ranks(rank_pool, 3, job(here, run__steps=steps, optimizer__momentum=0.9, transport__name=transport))
    return list(saved(here / "run", steps, 3)["shared"]["parameters"].values())


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    plain = {"schedule__name": "cosine", "schedule__warmup_steps": 4, "optimizer__momentum": 0.9}
    train_ranks(rank_pool, 3, job(tmp_path / "whole", **plain))
    signalled = {**plain, "task__options": {"action": "signal", "example": example_of(4, 1, 12, 3)}}
    stopped = train_ranks(rank_pool, 3, job(tmp_path, **signalled))
    assert {(one.kind, one.step, one.run_directory) for one in stopped} == {("StoppedError", 4, tmp_path / "run")}
    assert "SIGTERM" in stopped[1].message and "a signal to rank 1" in stopped[0].message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    # Resumed, the task sends itself the signal again when it meets that example in the next epoch, 5 steps on.
    again = train_ranks(rank_pool, 3, job(tmp_path, **signalled), resume="auto")
    assert {one.kind for one in again} == {"StoppedError"} and again[0].step is not None and 5 < again[0].step < 11
    while again[0].kind:
        again = train_ranks(rank_pool, 3, job(tmp_path, **signalled), resume="auto")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole" / "run")
    assert differences(saved(tmp_path / "run", 20, 3), saved(tmp_path / "whole" / "run", 20, 3)) == []


def refused(pool: RankPool, world_size: int, jobs: Job | list[Job]) -> str:
    """The one message with which all ranks refuse: a usage error."""
    ended = train_ranks(pool, world_size, jobs)
    assert all(issubclass(getattr(errors, one.kind), errors.UsageError) and one.threads == 0 for one in ended)
    assert len({one.kind for one in ended}) == 1
    (message,) = {one.message for one in ended}
    return message


def test_more_ranks_than_examples(rank_pool: RankPool, tmp_path: Path) -> None:
    message = refused(rank_pool, 3, job(tmp_path / "runs", task__options={"examples": 2}))
    assert "2 examples" in message and "3 ranks" in message
    message = refused(rank_pool, 3, job(tmp_path / "runs", global_batch_size=2, micro_batch_size=2))
    assert "batch.global_batch_size" in message
    assert list(tmp_path.iterdir()) == []


class Unfit(Misbehaving):
    """A model or a loss that cannot be trained, as `fault` says."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def model(self) -> nn.Module:
        model = super().model()
        if self.fault == "frozen":
            return model.requires_grad_(False)
        if self.fault == "sparse":
            return nn.Sequential(_Rounded(), nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(4 * INPUTS, 1))
        if self.fault.startswith("unused"):
            for number in range(int(self.fault.split()[1])):
                model.register_parameter(f"spare{number}", nn.Parameter(torch.zeros(3)))
        return model

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        losses = super().loss(model, batch)
        if self.fault == "twice":
            return torch.cat([losses, losses])
        return losses.mean() if self.fault == "mean" else losses


class _Rounded(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.round().long().clamp(-4, 4) + 4


@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
@pytest.mark.parametrize(
    "fault, said",
    [
        ("mean", "loss has the shape ()"),
        ("twice", "values for"),
        ("frozen", "no parameter that takes a gradient"),
        ("sparse", "sparse=False"),
        ("unused 1", "no gradient reaches spare0 of the model:"),
        ("unused 5", "no gradient reaches spare0, spare1, spare2 and 2 more of the model:"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_all_and_leaves_nothing(
    rank_pool: RankPool, tmp_path: Path, transport: str, fault: str, said: str
) -> None:
    settings = {"metrics__enabled": True, "transport__name": transport}
    here = job(tmp_path / "runs", task__name="test_training:Unfit", task__options={"fault": fault}, **settings)
    assert said in refused(rank_pool, 2, here)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_larger_than_the_training_set(rank_pool: RankPool, tmp_path: Path) -> None:
    here = job(tmp_path / "runs", batch__global_batch_size=1000, task__options={"examples": 77})
    message = refused(rank_pool, 2, here)
    assert "1,000 examples a step are more than the training set's 77" in message
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_metric(rank_pool: RankPool, tmp_path: Path) -> None:
    message = refused(rank_pool, 2, job(tmp_path / "runs", evaluation__metric="eror"))
    assert "did you mean error" in message
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(rank_pool: RankPool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(rank_pool, 2, job(tmp_path / "runs", metrics__enabled=True, metrics__port=port))
    assert f"port {port}" in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_exists_is_left_alone_and_the_port_is_free_again(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    message = refused(rank_pool, 2, job(tmp_path, metrics__enabled=True, metrics__port=port))
    assert "--resume auto" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "notes"]
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("where", ["task", "model"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_rank_that_refuses_is_heard_by_all(rank_pool: RankPool, tmp_path: Path, rank: int, where: str) -> None:
    options = {"action": "refuse", "where": where, "rank": rank}
    message = refused(rank_pool, 3, job(tmp_path / "runs", task__options=options, metrics__enabled=True))
    assert message == "this rank refuses"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("every_steps, kept", [(3, True), (None, False)])
def test_a_usage_error_in_the_middle_of_a_run_keeps_what_can_be_resumed(
    rank_pool: RankPool, tmp_path: Path, every_steps: int | None, kept: bool
) -> None:
    interval = {"checkpoint__every_steps": every_steps} if every_steps else {}
    options = {"action": "extra_metric"}
    here = job(
        tmp_path / "runs", task__options=options, run__steps=40, evaluation__every_steps=10, checkpoint__keep_best=0,
        **interval,
    )  # fmt: skip
    message = refused(rank_pool, 2, here)
    assert "extra" in message
    assert bool(list(tmp_path.glob("runs/run/checkpoints/step-*"))) == kept
    assert (tmp_path / "runs").exists() == kept


def test_all_ranks_hold_while_the_metrics_are_scraped(rank_pool: RankPool, tmp_path: Path) -> None:
    """For longer than any of them would wait for rank 0 in a collective."""
    here = job(tmp_path, metrics__enabled=True, metrics__hold_seconds=3.0, transport__timeout_seconds=2.0)
    began = time.monotonic()
    ended = train_ranks(rank_pool, 2, here)
    assert [(one.kind, one.threads) for one in ended] == [("", 0)] * 2
    assert time.monotonic() - began > 3


def test_a_signal_ends_the_hold(tmp_path: Path) -> None:
    stop = StopRequest()
    timer = threading.Timer(0.1, stop.handle, (signal.SIGTERM, None))
    timer.start()
    hold(job(tmp_path, metrics__enabled=True, metrics__hold_seconds=1e6), stop)
    timer.join()
    hold(job(tmp_path, metrics__enabled=False, metrics__hold_seconds=1e6), StopRequest())  # nobody could scrape


@pytest.mark.parametrize("dropout, population", [(0.0, TRAINING_EXAMPLES), (0.25, math.inf)])
def test_batches_come_from_a_population_unless_dropout_makes_every_draw_new(
    rank_pool: RankPool, tmp_path: Path, dropout: float, population: float
) -> None:
    here = digits(tmp_path, "sgd", global_batch_size=300, micro_batch_size=75, run__steps=3, task__dropout=dropout)
    train_ranks(rank_pool, 2, here)
    records, state = steps_of(tmp_path / "run"), saved(tmp_path / "run", 3, 2)["shared"]["noise_scale"]
    window = state["whole"]["plain"]
    assert window["observations"] == len(records) == 3
    traces, norms = np.frombuffer(window["variance_trace"]), np.frombuffer(window["squared_norm"])
    for record, trace, norm in zip(records, traces, norms, strict=True):
        assert norm == pytest.approx(record.gradient_norm**2 - trace * (1 / 300 - 1 / population), rel=1e-6)
    if not dropout:
        assert traces[0] == pytest.approx(trace_of_first_step(), rel=1e-3)


@pytest.mark.parametrize(
    "layer, is_random",
    [
        (nn.Linear(2, 2), False),
        (nn.Dropout(0.0), False),
        (nn.AlphaDropout(0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.LSTM(3, 3, num_layers=2, dropout=0.1), True),
        (nn.LSTM(3, 3, num_layers=2), False),
    ],
)
def test_every_layer_that_drops_out_is_found(layer: nn.Module, is_random: bool) -> None:
    assert population(nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer)), 61) == (math.inf if is_random else 61)


def trace_of_first_step() -> float:
    """McCandlish's two-point formula on the gradients of two halves of 150 examples at the first weights."""
    section = DigitsSection(name="digits", channels=4, batch_norm=False)
    images, labels = DigitsTask(section).datasets()[0].tensors
    torch.manual_seed(SEED)
    model = convolutional_network(section, IMAGE, CLASSES).double()
    order = BatchPlan(TRAINING_EXAMPLES, TRAINING_EXAMPLES, TRAINING_EXAMPLES, 1, SEED).order(0)
    gradients = []
    for half in (order[:150], order[150:300]):
        loss = cross_entropy(model(images[half].double()), labels[half])
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]))
    small = sum(float(each @ each) for each in gradients) / 2
    mean = (gradients[0] + gradients[1]) / 2
    return (small - float(mean @ mean)) / (1 / 150 - 1 / 300)
