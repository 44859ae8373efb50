"""What the wire formats cost a real model: the error of its gradients, and where training with them ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddp.job import DigitsSection, parse_job
from ddp.tasks.digits import DigitsTask
from ddp.telemetry.recording import open_recording, read_evaluations
from ddp.transport.base import BucketState
from ddp.transport.select import select_transport
from ranks import RankPool, process_group
from training_runs import train_ranks

# Of the averaged gradient's norm, for one step: a format rounds to 2^-9, 2^-12 of a number, int8 to 1/254 of a block's largest.
LARGEST_ERRORS = {"bfloat16": 2**-9, "float16": 2**-12, "int8": 0.02}
STEPS = 30


def _gradient(rank: int) -> Tensor:
    """Of the digits network on this rank's own examples, partly trained."""
    torch.manual_seed(0)
    task = DigitsTask(DigitsSection(name="digits", channels=6))
    model, (images, labels) = task.model(), task.datasets()[0].tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for rows in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    own = slice(128 * rank, 128 * (rank + 1))
    cross_entropy(model(images[own]), labels[own]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def _average(rank: int, world_size: int, store: str) -> dict[str, tuple[float, float]]:
    """By format: the relative error of one average, and of the sum of many."""
    with process_group(rank, world_size, store):
        gradient, errors = _gradient(rank), {}
        exact = gradient.double() / world_size
        dist.all_reduce(exact)
        for wire in LARGEST_ERRORS:
            transport = select_transport("shared_memory", "cpu", 60.0, wire=wire)
            state, total, first = BucketState.of([len(gradient)]), torch.zeros_like(exact), float("nan")
            for step in range(STEPS):
                bucket = gradient.clone()
                transport.all_reduce_mean_(bucket, 1 / world_size, state)
                total += bucket
                if step == 0:
                    first = float((bucket - exact).norm() / exact.norm())
            dist.barrier()
            transport.close()
            errors[wire] = (first, float((total / STEPS - exact).norm() / exact.norm()))
        return errors


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_error_of_a_real_models_gradients(rank_pool: RankPool, world_size: int) -> None:
    for errors in rank_pool.run(world_size, _average, timeout=120):
        for wire, largest in LARGEST_ERRORS.items():
            first, over_many = errors[wire]
            print(f"{wire}: {first:.2e} of one average, {over_many:.2e} of the mean of {STEPS}")
            assert largest / 100 < first < largest
            if wire == "int8":  # what one step loses comes with the next
                assert over_many < 2 * first / STEPS


def _accuracy(run_directory: Path) -> float:
    with contextlib.closing(open_recording(run_directory / "run.db")) as database:
        evaluations = read_evaluations(database)
    return [dict(each.metrics)["accuracy"] for each in evaluations if each.split == "validation"][-1]


def test_training_on_digits_ends_where_it_ends_without(rank_pool: RankPool, tmp_path: Path) -> None:
    accuracies = {}
    for wire in ("gradient", *LARGEST_ERRORS):
        table: dict[str, dict[str, Any]] = {
            "run": {"id": wire, "directory": str(tmp_path), "device": "cpu", "threads_per_rank": 1, "epochs": 5},
            "task": {"name": "digits"},
            "batch": {"global_batch_size": 64, "micro_batch_size": 32},
            "optimizer": {"name": "adam", "learning_rate": 1e-3},
            "transport": {"name": "shared_memory", "wire": wire, "timeout_seconds": 60.0},
            "metrics": {"enabled": False},
            "evaluation": {"metric": "accuracy"},
        }
        assert [ended.message for ended in train_ranks(rank_pool, 2, parse_job(table), timeout=120)] == ["", ""]
        accuracies[wire] = _accuracy(tmp_path / wire)
    print(accuracies)
    assert all(accuracy >= 0.97 for accuracy in accuracies.values()), accuracies
    assert max(accuracies.values()) - min(accuracies.values()) <= 0.015, accuracies  # 5 of 325 validation examples
