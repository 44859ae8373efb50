"""The moving average of the weights: torch's AveragedModel in a loop of one process, its evaluation, resume and export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddp import checkpoint
from ddp.checkpoint.export import export
from ddp.errors import CheckpointError
from ddp.job import AveragedWeightsSection, Job
from ddp.tasks import load_task
from ddp.telemetry.recording import open_recording, read_evaluations
from ddp.topology import Topology
from ddp.training.averaged_weights import AveragedWeights
from ddp.training.saved_model import read_saved_model
from ddp.training.session import session
from ddp.training.state import READINGS_BYTES, expected_bytes
from ranks import RankPool
from training_runs import agent_environment, differences, job, saved, train_ranks

DECAY, STEPS = 0.8, 14


def run(pool: RankPool, folder: Path, world_size: int, steps: int = STEPS, resume: str | None = None) -> None:
    settings = {"averaged_weights__decay": DECAY, "averaged_weights__every_steps": 2, "evaluation__every_steps": 7}
    here = job(
        *(folder,),
        task__name="digits",
        task__channels=4,
        run__steps=steps,
        evaluation__metric="accuracy",
        checkpoint__every_steps=1,
        checkpoint__keep=40,
        **settings,
    )
    assert {one.kind for one in train_ranks(pool, world_size, here, resume=resume)} == {""}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_is_the_average_of_the_weights_as_they_were(rank_pool: RankPool, tmp_path: Path, world_size: int) -> None:
    run(rank_pool, tmp_path, world_size)
    average: dict[str, torch.Tensor] = {}
    statistics: list[dict[str, torch.Tensor]] = [{} for _ in range(world_size)]
    for step in range(2, STEPS + 1, 2):
        state = saved(tmp_path / "run", step, world_size)
        for name, weight in state["shared"]["parameters"].items():
            average[name] = weight if step == 2 else DECAY * average[name] + (1 - DECAY) * weight
        for rank, kept in enumerate(statistics):
            for name, value in state["own"][rank]["buffers"].items():
                is_count = not value.is_floating_point()
                kept[name] = value if step == 2 or is_count else DECAY * kept[name] + (1 - DECAY) * value
    state = saved(tmp_path / "run", STEPS, world_size)
    for name, weight in average.items():
        torch.testing.assert_close(state["shared"]["averaged_parameters"][name], weight, rtol=1e-5, atol=1e-6)
    for rank, kept in enumerate(statistics):
        for name, value in kept.items():
            torch.testing.assert_close(state["own"][rank]["averaged_buffers"][name], value, rtol=1e-5, atol=1e-6)
    with open_recording(tmp_path / "run" / "run.db") as database:
        found = {(each.step, each.split): each for each in read_evaluations(database)}
    assert {split for _, split in found} == {"training", "validation", "validation, averaged weights"}
    assert found[STEPS, "validation, averaged weights"].loss != found[STEPS, "validation"].loss


def test_a_resumed_average_goes_on_bit_for_bit(rank_pool: RankPool, tmp_path: Path) -> None:
    run(rank_pool, tmp_path / "whole", 2)
    run(rank_pool, tmp_path / "parts", 2, steps=7)
    run(rank_pool, tmp_path / "parts", 2, resume="auto")
    whole, parts = (saved(tmp_path / folder / "run", STEPS, 2) for folder in ("whole", "parts"))
    for name in ("averaged_weights", "averaged_parameters"):
        assert not differences(whole["shared"][name], parts["shared"][name])
    assert not differences(whole["own"], parts["own"])


def test_the_average_is_exported_and_one_that_is_not_there_is_missed(rank_pool: RankPool, tmp_path: Path) -> None:
    run(rank_pool, tmp_path, 2, steps=4)
    path = checkpoint.find(tmp_path / "run" / "checkpoints", 4)
    export(path, tmp_path / "averaged.safetensors", averaged=True)
    found, state = load_file(tmp_path / "averaged.safetensors"), saved(tmp_path / "run", 4, 2)
    assert found.keys() == load_names(path)
    for name, weight in state["shared"]["averaged_parameters"].items():
        assert torch.equal(found[name], weight)
    means = [state["own"][rank]["averaged_buffers"]["1.running_mean"].double() for rank in range(2)]
    torch.testing.assert_close(found["1.running_mean"].double(), sum(means) / 2, rtol=1e-6, atol=1e-9)
    here = job(tmp_path / "plain", run__steps=1, task__name="digits", task__channels=4)
    train_ranks(rank_pool, 1, here)
    plain = checkpoint.find(tmp_path / "plain" / "run" / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        export(plain, tmp_path / "none.safetensors", averaged=True)
    assert not (tmp_path / "none.safetensors").exists()
    model = load_task(here.task).model()
    with pytest.raises(
        CheckpointError, match=r"has no averaged weights; its run kept none \(averaged_weights.decay\)$"
    ):
        read_saved_model(plain).load_into(model, averaged=True)


def load_names(path: Path) -> set[str]:
    return set(checkpoint.load_shared(path)["state_dict"])


def test_counters_indices_and_masks_are_taken_as_they_are() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("ids", torch.arange(5))
            self.register_buffer("mask", torch.tensor([True, False]))

    module = Positions()
    averaged = AveragedWeights(AveragedWeightsSection(decay=0.999), module)
    for step in range(1, 9):
        averaged.observe(step)
    buffers = dict(averaged.module.named_buffers())
    assert torch.equal(buffers["ids"], torch.arange(5)) and buffers["mask"].tolist() == [True, False]
    assert averaged.updates == 8


def one_rank(rank: int, world_size: int, store_address: str, here: Job) -> tuple[int, int]:
    """Bytes that a checkpoint is expected to take, and those of what it holds."""
    with agent_environment(store_address), session(here, Topology(rank, world_size, rank, world_size)) as opened:
        trainer = opened.trainer
        steps = opened.steps()
        for step in range(1, 4):
            trainer.step(steps)
            if trainer.early_stopping is not None:
                trainer.early_stopping.observe(step, float(step), -float(step))
        registry = trainer.saving.registry
        held = sum(tensor_bytes(each) for each in (registry.shared(), registry.own()))
        return expected_bytes(trainer) - READINGS_BYTES, held


def tensor_bytes(nest: Any) -> int:
    if isinstance(nest, torch.Tensor):
        return nest.numel() * nest.element_size()
    values = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, list | tuple) else ()
    return sum(map(tensor_bytes, values))


@pytest.mark.parametrize("copies", [1, 3])
def test_the_room_that_is_asked_for_counts_each_copy_of_the_model(
    rank_pool: RankPool, tmp_path: Path, copies: int
) -> None:
    more = {
        "averaged_weights__decay": DECAY,
        "early_stopping__patience": 9,
        "early_stopping__restore_best_weights": True,
    }
    settings = {"task__name": "digits", "optimizer__name": "adam", **(more if copies == 3 else {})}
    ((expected, held),) = rank_pool.run(1, one_rank, job(tmp_path, **settings))
    assert expected == pytest.approx(held, rel=0.2)
