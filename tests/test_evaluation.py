"""Evaluation over several gloo processes against a plain loop over all examples in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp.errors import UsageError
from ddp.tasks.base import Goal, Task, TensorExamples
from ddp.training.evaluation import averaged_buffers, evaluate

CPU = torch.device("cpu")


class Regression:
    """A small task with BatchNorm in its model and two metrics whose values differ from example to example."""

    goals: Mapping[str, Goal] = {"error": "min", "close": "max"}

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def model(self) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 1))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        generator = torch.Generator().manual_seed(6)
        x = torch.randn(self.examples, 4, generator=generator)
        examples = TensorExamples(x, x.sum(dim=1).exp())
        return examples, examples

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).squeeze(1) - batch[1]).square()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        error = (model(batch[0]).squeeze(1) - batch[1]).abs()
        return {"error": error, "close": error < 0.5}


def set_statistics_(model: nn.Module, rank: int) -> None:
    """Running statistics as after training on data of this rank's own."""
    layer = cast(nn.BatchNorm1d, model[1])  # type: ignore[index]
    generator = torch.Generator().manual_seed(rank)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(torch.randn(6, generator=generator))
    layer.running_var.copy_(torch.rand(6, generator=generator) + 0.5 + rank)


def statistics(model: nn.Module) -> list[list[float]]:
    layer = cast(nn.BatchNorm1d, model[1])  # type: ignore[index]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return [layer.running_mean.tolist(), layer.running_var.tolist()]


def evaluate_as(rank: int, world_size: int, examples: int, batch_size: int) -> dict[str, Any]:
    """What one rank does and finds."""
    task = Regression(examples)
    model = task.model()
    set_statistics_(model, rank)
    before = statistics(model)
    model.train()
    averaged = averaged_buffers(model, world_size=world_size)
    found = evaluate(
        task, averaged, task.datasets()[1], rank=rank, world_size=world_size, batch_size=batch_size, device=CPU
    )
    assert found is not None
    assert statistics(model) == before, "a rank's own statistics are its own"
    assert all(module.training for module in [*model.modules(), *averaged.modules()])
    return {
        "loss": found.loss,
        "metrics": found.metrics,
        "examples": found.examples,
        "statistics": statistics(averaged),
    }


def run_ranks(world_size: int, examples: int, batch_size: int, folder: Path) -> list[dict[str, Any]]:
    """`evaluate_as` in real processes; their answers in rank order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(number) for number in (world_size, examples, batch_size)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *arguments, str(folder / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * world_size, "\n".join(err for _, err in outputs)
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def reference(world_size: int, examples: int) -> dict[str, Any]:
    """One process, one example at a time, float64, statistics averaged by hand."""
    task = Regression(examples)
    model = task.model()
    per_rank: list[list[list[float]]] = []
    for rank in range(world_size):
        set_statistics_(model, rank)
        per_rank.append(statistics(model))
    mean = torch.tensor(per_rank, dtype=torch.float64).mean(dim=0)
    layer = cast(nn.BatchNorm1d, model[1])  # type: ignore[index]
    layer.running_mean, layer.running_var = mean[0].float(), mean[1].float()
    model.eval().double()
    x, y = (tensor.double() for tensor in task.datasets()[1].tensors)
    with torch.no_grad():
        errors = [float(model(x[i : i + 1]) - y[i]) for i in range(examples)]
    metrics = {"error": sum(map(abs, errors)) / examples, "close": sum(abs(e) < 0.5 for e in errors) / examples}
    return {"loss": sum(e * e for e in errors) / examples, "metrics": metrics, "statistics": mean.tolist()}


def assert_agrees(got: dict[str, Any], world_size: int, examples: int) -> None:
    expected = reference(world_size, examples)
    assert got["examples"] == examples
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    torch.testing.assert_close(torch.tensor(got["statistics"]), torch.tensor(expected["statistics"]))


@pytest.mark.parametrize(
    ("world_size", "examples", "batch_size"), [(2, 23, 5), (3, 23, 4), (3, 2, 8)], ids=["2", "3", "idle-rank"]
)
def test_ranks_find_together_what_one_process_finds(
    world_size: int, examples: int, batch_size: int, tmp_path: Path
) -> None:
    answers = run_ranks(world_size, examples, batch_size, tmp_path)
    assert all(answer == answers[0] for answer in answers)  # to the last bit
    assert_agrees(answers[0], world_size, examples)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_one_process_needs_no_process_group(batch_size: int) -> None:
    assert_agrees(evaluate_as(0, 1, examples=11, batch_size=batch_size), 1, 11)


def test_small_values_are_not_lost_beside_large_ones() -> None:
    """2^24 + 1 is no float32: a sum in single precision would stay at the large value."""
    values = torch.tensor([2.0**24] + [1.0] * 1000)
    task = SimpleNamespace(goals={"a": "max"}, loss=lambda _, batch: batch[0], metrics=lambda _, batch: {"a": batch[0]})
    found = evaluate(
        cast(Task, task), nn.Identity(), TensorExamples(values), rank=0, world_size=1, batch_size=1, device=CPU
    )
    assert found is not None
    assert found.loss == found.metrics["a"] == (2**24 + 1000) / 1001


def test_a_signal_ends_it_early() -> None:
    asked = iter([False, True])
    task = SimpleNamespace(goals={}, loss=lambda _, batch: (time.sleep(0.6), batch[0])[1], metrics=lambda *_: {})
    found = evaluate(
        cast(Task, task), nn.Identity(), TensorExamples(torch.zeros(50)),
        rank=0, world_size=1, batch_size=1, device=CPU, asked_to_stop=lambda: next(asked),
    )  # fmt: skip
    assert found is None


def test_modes_and_the_global_generator_are_restored() -> None:
    task = Regression(5)
    model = task.model()
    model[1].eval()  # type: ignore[index]  # frozen, as when fine-tuning
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate(task, model, task.datasets()[1], rank=0, world_size=1, batch_size=2, device=CPU)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_restored_after_an_error() -> None:
    task = Regression(5)
    model = task.model()
    with pytest.raises(RuntimeError):
        evaluate(task, model, TensorExamples(torch.zeros(3, 9), torch.zeros(3)),
                 rank=0, world_size=1, batch_size=2, device=CPU)  # fmt: skip
    assert all(module.training for module in model.modules())


def test_the_copy_shares_parameters_and_nothing_else() -> None:
    model = Regression(5).model()
    model[0].weight.grad = torch.ones(6, 4)  # type: ignore[index]
    twin = averaged_buffers(model, world_size=1)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not {id(buffer) for buffer in model.buffers()} & {id(buffer) for buffer in twin.buffers()}
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in twin.named_buffers()]


@pytest.mark.parametrize(
    ("losses", "metrics", "message"),
    [
        (torch.zeros(()), {"a": torch.zeros(2)}, r"loss has the shape \(\)"),
        (torch.zeros(2), {"a": torch.zeros(())}, r"a has the shape \(\)"),
        (torch.zeros(2), {"a": torch.zeros(2, 1)}, r"a has the shape \(2, 1\)"),
        (torch.zeros(2), {"b": torch.zeros(2)}, "metrics gave b, but goals names a"),
        (torch.zeros(1), {"a": torch.zeros(1)}, "1 of 2 examples"),
    ],
)
def test_values_that_are_not_one_for_each_example_are_refused(
    losses: Tensor, metrics: dict[str, Tensor], message: str
) -> None:
    task = SimpleNamespace(goals={"a": "max"}, loss=lambda *_: losses, metrics=lambda *_: metrics)
    with pytest.raises(UsageError, match=message):
        evaluate(cast(Task, task), nn.Identity(), TensorExamples(torch.zeros(2)),
                 rank=0, world_size=1, batch_size=2, device=CPU)  # fmt: skip


def main() -> None:
    """One rank of `run_ranks`."""
    rank, world_size, examples, batch_size = map(int, sys.argv[1:5])
    store = dist.FileStore(sys.argv[5], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        print(json.dumps(evaluate_as(rank, world_size, examples, batch_size)))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
