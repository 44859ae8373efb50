"""Asked to stop while a run is set up, evaluates or saves: all ranks stop together with a checkpoint, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp import checkpoint
from ranks import RankPool
from training_runs import Misbehaving, differences, job, losses_of, saved, train_ranks

PLAIN = {"schedule__name": "cosine", "schedule__warmup_steps": 3, "optimizer__name": "adamw", "run__epochs": 3}
PLAIN |= {"transport__name": "shared_memory", "checkpoint__every_steps": 4}


class Signalled(Misbehaving):
    """The rank `rank` gets SIGTERM in its first `where`: model, datasets, evaluation (and that is slow)."""

    def __init__(self, where: str, rank: int, mark: str) -> None:
        super().__init__()
        self.place, self.mark = where, Path(mark)
        self.chosen = dist.get_rank() == rank

    def model(self) -> nn.Module:
        self._signal("model")
        return super().model()

    def datasets(self) -> Any:
        self._signal("datasets")
        return super().datasets()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Tensor]:
        if not torch.is_grad_enabled():
            self._signal("evaluation")
        return super().metrics(model, batch)

    def _signal(self, where: str) -> None:
        if where == self.place and self.chosen and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)


@pytest.mark.parametrize("where, step", [("model", 0), ("datasets", 0), ("evaluation", 5)])
@pytest.mark.parametrize("rank", [0, 2])
def test_all_stop_with_a_checkpoint_and_go_on_as_if_nothing_had_been(
    rank_pool: RankPool, tmp_path: Path, where: str, step: int, rank: int
) -> None:
    options = {"where": where, "rank": rank, "mark": str(tmp_path / "mark")}
    settings = {**PLAIN, "task__name": "test_stopping:Signalled", "task__options": options}
    stopped = train_ranks(rank_pool, 3, job(tmp_path, **settings))
    assert {(one.kind, one.step) for one in stopped} == {("StoppedError", step)}, stopped
    assert "SIGTERM" in stopped[rank].message and f"a signal to rank {rank}" in stopped[2 - rank].message
    assert saved(tmp_path / "run", step, 3)["shared"]["counters"]["step"] == step
    ended = train_ranks(rank_pool, 3, job(tmp_path, **settings), resume="auto")
    assert [one.kind for one in ended] == ["", "", ""], ended
    train_ranks(rank_pool, 3, job(tmp_path / "whole", **PLAIN))
    run, whole = tmp_path / "run", tmp_path / "whole" / "run"
    assert losses_of(run) == losses_of(whole)
    assert differences(saved(run, 15, 3), saved(whole, 15, 3)) == []


def test_the_clock_of_rank_0_saves_on_all_ranks(rank_pool: RankPool, tmp_path: Path) -> None:
    """A step takes some 5 ms, and the checkpoints are complete although no step is named for them."""
    slow = {
        "task__options": {"action": "overhead"},
        "run__steps": 60,
        "checkpoint__keep": 9,
        "checkpoint__keep_best": 0,
    }
    ended = train_ranks(rank_pool, 3, job(tmp_path, checkpoint__every_seconds=0.1, evaluation__every_epochs=99, **slow))
    assert [one.kind for one in ended] == ["", "", ""], ended
    held = [checkpoint.verify(path) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 3 <= len(held) < 60 and {manifest.world_size for manifest in held} == {3}
