"""One rank's parameters change behind everyone's back: named on all ranks within one interval, and never in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp import checkpoint
from ddp.transport.row import StepRow
from ranks import RankPool
from training_runs import Misbehaving, job, steps_of, train_ranks

EXPONENT = 1 << 29  # of a small float32: times 2^64


class Flipped(Misbehaving):
    """In its `step`-th step of training the rank `rank` finds a bit of its first weight matrix flipped."""

    def __init__(self, rank: int, step: int, mask: int = EXPONENT) -> None:
        super().__init__()
        self.harmed = dist.get_rank() == rank
        self.left, self.mask = step + 1, mask  # the first backward only settles DDP's buckets

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses = super().loss(model, batch)
        self.left -= torch.is_grad_enabled()
        if self.left == 0 and self.harmed and torch.is_grad_enabled():
            self.left = -1
            assert Misbehaving.last_model is not None
            weight = next(Misbehaving.last_model.parameters())
            weight.data.view(torch.int32)[1, 2] ^= self.mask
        return losses


def flipped(rank: int, step: int, **options: Any) -> dict[str, Any]:
    return {"task__name": "test_replica_watch:Flipped", "task__options": {"rank": rank, "step": step, **options}}


@pytest.mark.parametrize("world_size, rank, transport", [(2, 1, "shared_memory"), (3, 0, "c10d"), (4, 2, "auto")])
def test_named_on_all_ranks_within_an_interval(
    rank_pool: RankPool, tmp_path: Path, world_size: int, rank: int, transport: str
) -> None:
    settings = {"faults__check_replicas_every_steps": 4, "transport__name": transport, "checkpoint__keep_best": 0}
    ended = train_ranks(rank_pool, world_size, job(tmp_path, **flipped(rank, 6), **settings))
    assert {one.kind for one in ended} == {"ReplicaError"}, ended
    (message,) = {one.message for one in ended}
    assert f"on rank {rank}" in message and "0.weight[1, 2]" in message
    assert "to differ after step 8" in message and "after step 4 they were the same" in message
    assert len(steps_of(tmp_path / "run")) == 8  # the ninth is not taken


def test_what_is_saved_is_compared_first(rank_pool: RankPool, tmp_path: Path) -> None:
    """No comparison is asked for; the checkpoints of step 4 and 8 are whole, the one of 12 gets no name."""
    settings = {"faults__check_replicas_every_steps": False, "checkpoint__every_steps": 4, "checkpoint__keep_best": 0}
    ended = train_ranks(rank_pool, 3, job(tmp_path, **flipped(1, 10), **settings))
    assert {one.kind for one in ended} == {"ReplicaError"}, ended
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and checkpoint.read_manifest(newest).step == 8


def test_a_run_whose_end_is_wrong_does_not_end_well(rank_pool: RankPool, tmp_path: Path) -> None:
    ended = train_ranks(rank_pool, 2, job(tmp_path, run__steps=5, **flipped(0, 5)))
    assert {one.kind for one in ended} == {"ReplicaError"}, ended
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize("settings", [{}, {"optimizer__name": "adamw", "transport__wire": "bfloat16"}], ids=str)
def test_nobody_is_named_where_all_is_well(rank_pool: RankPool, tmp_path: Path, settings: Mapping[str, Any]) -> None:
    ended = train_ranks(rank_pool, 3, job(tmp_path, faults__check_replicas_every_steps=1, **settings))
    assert [one.kind for one in ended] == [""] * 3, ended


def test_the_row_carries_it() -> None:
    row = StepRow(1, 2.0, checksum_high=4294967295.0, checksum_low=1.0, part_saved=-3.0, metric_sum=0.5)
    assert StepRow.unpack(row.pack()) == row
