"""A state that cannot be gone on from is refused before anything is changed, and the user is told how to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp.job import Job
from ddp.training import saving
from ddp.training.saving import Saving
from ddp.training.trainer import Trainer
from ranks import RankPool
from training_runs import Ended, job, train_one, train_ranks

CHANGES: dict[str, Mapping[str, Any]] = {
    "noise_scale": {"whole": {}},
    "course": {"epoch": 0},
    "optimizer": {"state": {}, "param_groups": []},
}


@pytest.mark.parametrize(
    "part, advice",
    [
        ("noise_scale", "start a new run, or resume without it, --set noise_scale.enabled=false"),
        ("course", "start a new run, or resume an earlier checkpoint"),
        ("optimizer", "start a new run, or bring the optimizer back"),
    ],
)
def test_a_state_that_cannot_be_read_leaves_the_trainer_as_it_was(
    rank_pool: RankPool, tmp_path: Path, part: str, advice: str
) -> None:
    train_ranks(rank_pool, 2, job(tmp_path, run__steps=4))
    for ended, unchanged in rank_pool.run(2, resume_with, job(tmp_path, run__steps=8), part):
        assert ended.kind == "CheckpointError" and unchanged
        assert "step-00000004-loss=" in ended.message and advice in ended.message
    off = job(tmp_path, run__steps=8, noise_scale__enabled=False)
    for ended, _ in rank_pool.run(2, resume_with, off, "noise_scale"):
        assert ended.kind == ""


def resume_with(rank: int, world_size: int, store_address: str, here: Job, part: str) -> tuple[Ended, bool]:
    """`part` of the checkpoint replaced as it is read; and whether weights, readings and position stayed."""
    load, settle, restore = saving.load, Trainer.settle, Saving.restore
    trainers: list[Trainer] = []
    unchanged: list[bool] = []

    def changed(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        shared, own = load(*arguments)
        return shared | {part: CHANGES[part]}, own

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
