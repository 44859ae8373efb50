"""A state that cannot be gone on from is refused before anything is changed, and the user is told how to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddp.job import Job
from ddp.training import saving
from ddp.training.saving import Saving
from ddp.training.trainer import Trainer
from ranks import RankPool
from training_runs import EXAMPLES, Ended, job, train_one, train_ranks

COUNTERS = {"step": 4, "examples_total": 48, "training_examples": EXAMPLES}
CHANGES: dict[str, tuple[str, Any, str]] = {
    "no readings": ("noise_scale", {"whole": {}}, "resume without it, --set noise_scale.enabled=false"),
    "no position": ("course", {"epoch": 0}, "start a new run, or resume an earlier checkpoint"),
    "no epoch": ("course", {"epoch": float("nan"), "position": 48}, "start a new run, or resume an earlier checkpoint"),
    "beyond the data": ("course", {"epoch": 0, "position": EXAMPLES}, "start a new run, or resume an earlier"),
    "no groups": ("optimizer", {"state": {}, "param_groups": []}, "start a new run, or bring the optimizer back"),
    "no settings": ("optimizer", {"state": {}, "param_groups": [{"params": [0, 1, 2, 3]}]}, "bring the optimizer back"),
    "no table": ("optimizer", "x", "bring the optimizer back"),
    "no number": ("counters", {**COUNTERS, "step": "x"}, "its counters are no numbers"),
    "below zero": ("counters", {**COUNTERS, "step": -5}, "its counters are no numbers"),
    "another step": ("counters", {**COUNTERS, "step": 5}, "its state is of step 5, not 4"),
}


def test_a_state_that_cannot_be_read_leaves_the_trainer_as_it_was(rank_pool: RankPool, tmp_path: Path) -> None:
    train_ranks(rank_pool, 2, job(tmp_path, run__steps=4))
    for change, (_, _, advice) in CHANGES.items():
        for ended, unchanged in rank_pool.run(2, resume_with, job(tmp_path, run__steps=8), change):
            assert ended.kind == "CheckpointError" and unchanged, (change, ended)
            assert "step-00000004-loss=" in ended.message and advice in ended.message
    off = job(tmp_path, run__steps=8, noise_scale__enabled=False)
    for ended, _ in rank_pool.run(2, resume_with, off, "no readings"):
        assert ended.kind == ""


def resume_with(rank: int, world_size: int, store_address: str, here: Job, change: str) -> tuple[Ended, bool]:
    """One part of the checkpoint replaced as it is read; and whether weights, readings and position stayed."""
    load, settle, restore = saving.load, Trainer.settle, Saving.restore
    part, value, _ = CHANGES[change]
    trainers: list[Trainer] = []
    unchanged: list[bool] = []

    def changed(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shared, own = load(*arguments)
        return shared | {part: value}, own

    def noted(trainer: Trainer) -> None:
        trainers.append(trainer)
        settle(trainer)

    def watched(self: Saving, path: Path) -> None:
        (trainer,) = trainers
        before = [each.detach().clone() for each in trainer.model.parameters()], repr(_rest(trainer))
        try:
            restore(self, path)
        finally:
            same = all(map(torch.equal, before[0], trainer.model.parameters()))
            unchanged.append(same and repr(_rest(trainer)) == before[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "load", changed)
        patch.setattr(Trainer, "settle", noted)
        patch.setattr(Saving, "restore", watched)
        ended = train_one(rank, world_size, store_address, [here] * world_size, "auto")
    return ended, unchanged[0]


def _rest(trainer: Trainer) -> tuple[Any, ...]:
    tracker = trainer.watch.tracker
    return trainer.course.state_dict(), None if tracker is None else tracker.state_dict(), trainer.step_count
