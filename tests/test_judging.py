"""Steps that are not finite: passed over, rolled back or the end, by the same verdict on all ranks in that step."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp.errors import DivergedError
from ddp.job import FaultsSection
from ddp.training.data import BatchPlan
from ddp.training.judging import BuffersBefore, Judge, Verdict
from ddp.transport.row import StepRow
from ranks import RankPool
from training_runs import EXAMPLES, INPUTS, Misbehaving, differences, job, losses_of, saved, train_ranks

BATCH, STEPS = 12, 20


def rows(*finite: bool, norm: float = 1.0) -> list[StepRow]:
    return [
        StepRow(examples=3, own_squared_norm=1.0 + rank, finite=float(each), mean_squared_norm=norm)
        for rank, each in enumerate(finite)
    ]


def test_the_end_says_which_rank_and_step() -> None:
    judge = Judge(FaultsSection())
    assert judge.judge(rows(True, True), 1, 0.1) is Verdict.TAKE
    with pytest.raises(DivergedError, match=r"not finite on rank 0, 2 in step 2 \(epoch 0\.25\): lower"):
        judge.judge(rows(False, True, False), 2, 0.25)
    with pytest.raises(DivergedError, match="averaged gradient overflows in step 3"):
        judge.judge(rows(True, True, norm=math.inf), 3, 0.5)


def test_so_many_in_a_row_are_passed_over() -> None:
    judge = Judge(FaultsSection(on_not_finite="skip", max_skipped_steps=2))
    bad, good = rows(True, False), rows(True, True)
    verdicts = [judge.judge(each, step, 0.0) for step, each in enumerate([bad, bad, good, bad, bad], 1)]
    assert verdicts == [Verdict.SKIP, Verdict.SKIP, Verdict.TAKE, Verdict.SKIP, Verdict.SKIP]
    assert judge.rank == 1
    with pytest.raises(DivergedError, match=r"in step 6 .* after 2 steps in a row \(faults.max_skipped_steps\)"):
        judge.judge(bad, 6, 0.0)


def test_a_step_that_fails_again_after_a_roll_back_is_passed_over() -> None:
    judge = Judge(FaultsSection(on_not_finite="roll_back", max_roll_backs=2))
    bad = rows(False, False)
    assert [judge.judge(bad, 7, 0.0), judge.judge(bad, 7, 0.0)] == [Verdict.ROLL_BACK, Verdict.SKIP]
    assert judge.rank == -1
    assert judge.judge(bad, 8, 0.0) is Verdict.ROLL_BACK
    with pytest.raises(DivergedError, match=r"in step 9 .* after 2 roll-backs \(faults.max_roll_backs\)"):
        judge.judge(bad, 9, 0.0)


def test_buffers_come_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = BuffersBefore(model)
    before.keep()
    kept = [buffer.clone() for buffer in model.buffers()]
    model(torch.full((4, 3), math.nan))
    assert any(buffer.isnan().any() for buffer in model.buffers())
    before.bring_back()
    assert all(map(torch.equal, model.buffers(), kept))


def float64_loop(passed_over: Iterable[int], world_size: int) -> tuple[list[Tensor], int]:
    """Parameters of one process with the whole batch after `STEPS` steps, without those whose batches hold one of
    these, and how many are left. An epoch's last batch depends on the number of ranks."""
    task = object.__new__(Misbehaving)
    task.action, task.example, task.examples = "none", -1, EXAMPLES
    numbers, inputs, targets = task.datasets()[0].tensors  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    plan = BatchPlan(EXAMPLES, BATCH, BATCH, world_size, 0)
    taken = 0
    batches = (plan.order(epoch)[list(plan.batch(p))] for epoch in itertools.count() for p in plan.positions())
    for batch in itertools.islice(batches, STEPS):
        if not set(passed_over).isdisjoint(numbers[batch].tolist()):
            continue
        taken += 1
        model.zero_grad()
        ((model(inputs[batch].double())[:, 0] - targets[batch]).square().mean()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.05 * parameter.grad)  # type: ignore[operator]
    return [parameter.detach() for parameter in model.parameters()], taken


@pytest.mark.parametrize("world_size, action, transport", [
    (1, "nan_loss", "auto"), (2, "nan_gradient", "shared_memory"), (3, "nan_loss", "c10d"), (4, "nan_gradient", "auto"),
])  # fmt: skip
def test_what_is_passed_over_was_never_there(
    rank_pool: RankPool, tmp_path: Path, world_size: int, action: str, transport: str
) -> None:
    """The example comes once an epoch; its steps are left out, and all else is as in a loop without them."""
    bad = {"task__options": {"action": action, "example": 17}, "transport__name": transport}
    ended = train_ranks(rank_pool, world_size, job(tmp_path, faults__on_not_finite="skip", **bad))
    assert [one.kind for one in ended] == [""] * world_size, ended
    parameters, taken = float64_loop([17], world_size)
    for one in ended:
        for found, expected in zip(one.parameters, parameters, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(losses_of(tmp_path / "run")) == taken < STEPS - 1
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))
    assert saved(tmp_path / "run", STEPS, world_size)["shared"]["counters"]["step"] == STEPS


def test_running_statistics_and_what_quantising_left_over_stay_finite(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {"task__name": "test_judging:Normalising", "task__options": {"example": 17}, "transport__wire": "int8"}
    ended = train_ranks(rank_pool, 2, job(tmp_path, faults__on_not_finite="skip", **settings))
    assert [one.kind for one in ended] == ["", ""], ended
    held = saved(tmp_path / "run", STEPS, 2)
    for own in held["own"].values():
        assert all(bool(tensor.isfinite().all()) for tensor in own["buffers"].values())
        left_over = [tensor for each in own["exchange"]["left_over"].values() for tensor in each.values()]
        assert left_over and all(bool(tensor.isfinite().all()) for tensor in left_over)


class Normalising(Misbehaving):
    """BatchNorm, and one example whose inputs are not finite."""

    def __init__(self, example: int) -> None:
        super().__init__("none", example)

    def model(self) -> nn.Module:
        Misbehaving.last_model = nn.Sequential(nn.BatchNorm1d(INPUTS), nn.Linear(INPUTS, 1))
        return Misbehaving.last_model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        numbers, inputs, targets = batch
        chosen = (numbers == self.example)[:, None]
        return super().loss(model, (numbers, torch.where(chosen, math.inf, inputs), targets))


@pytest.mark.parametrize("policy, said", [
    ("skip", "in a row"), ("roll_back", "after 3 roll-backs"), ("stop", "lower optimizer"),
])  # fmt: skip
def test_every_policy_has_an_end(rank_pool: RankPool, tmp_path: Path, policy: str, said: str) -> None:
    """All examples are bad from the first step on."""
    settings: Mapping[str, Any] = {"task__name": "test_judging:Hopeless", "faults__max_skipped_steps": 3}
    ended = train_ranks(rank_pool, 2, job(tmp_path, faults__on_not_finite=policy, **settings))
    assert {(one.kind, one.step) for one in ended} == {("DivergedError", 1 if policy == "stop" else 4)}, ended
    assert all(said in one.message for one in ended)


class Hopeless(Misbehaving):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) / (0.0 if torch.is_grad_enabled() else 1.0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_fault_that_passes_is_rolled_back_to_the_same_run(
    rank_pool: RankPool, tmp_path: Path, world_size: int
) -> None:
    """A cosmic ray in one rank's step 11; the run goes back to step 8 and ends as if nothing had been."""
    plain = {"checkpoint__every_steps": 4, "optimizer__name": "adamw", "transport__name": "shared_memory"}
    plain |= {"faults__on_not_finite": "roll_back", "schedule__name": "cosine", "schedule__warmup_steps": 3}
    once = {"task__name": "test_judging:Once", "task__options": {"step": 11}}
    train_ranks(rank_pool, world_size, job(tmp_path / "whole", **plain))
    ended = train_ranks(rank_pool, world_size, job(tmp_path, **plain, **once))
    assert [one.kind for one in ended] == [""] * world_size, ended
    run, whole = tmp_path / "run", tmp_path / "whole" / "run"
    assert losses_of(run) == losses_of(whole)
    one, other = saved(run, STEPS, world_size), saved(whole, STEPS, world_size)
    assert [held["shared"].pop("judge")["roll_backs"] for held in (one, other)] == [1, 0]
    assert differences(one, other) == []


class Once(Misbehaving):
    """The last rank's loss is not finite in its so-many-th step in training, and never again."""

    def __init__(self, step: int | str, stops: bool = False) -> None:
        """`step` may be the name of a file that says it, so that two parts of a run differ in it; `stops`: a signal comes then."""
        super().__init__()
        self.stops = stops
        self.left = (
            int(Path(step).read_text() if isinstance(step, str) else step) + 1
        )  # the first settles DDP's buckets

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses = super().loss(model, batch)
        if not torch.is_grad_enabled():
            return losses
        self.left -= 1
        if self.left != 0 or dist.get_rank() != dist.get_world_size() - 1:
            return losses
        if self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses * math.nan


def test_what_was_passed_over_is_recorded(rank_pool: RankPool, tmp_path: Path) -> None:
    bad = {"task__options": {"action": "nan_loss", "example": 17}, "faults__on_not_finite": "skip"}
    train_ranks(rank_pool, 2, job(tmp_path, run__steps=6, **bad))
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "run.db")) as database:
        kinds = [kind for (kind,) in database.execute("SELECT kind FROM events WHERE kind = 'not_finite'")]
    assert kinds


def test_without_a_checkpoint_to_go_back_to_the_step_is_passed_over(rank_pool: RankPool, tmp_path: Path) -> None:
    plain = {"faults__on_not_finite": "roll_back", "checkpoint__keep_best": 0}
    once = {"task__name": "test_judging:Once", "task__options": {"step": 2}}
    ended = train_ranks(rank_pool, 2, job(tmp_path, **plain, **once))
    assert [one.kind for one in ended] == ["", ""], ended
    assert len(losses_of(tmp_path / "run")) == STEPS - 1


def test_a_roll_back_never_goes_forward_to_what_the_run_went_back_from(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {"checkpoint__every_steps": 4, "checkpoint__keep": 9, "faults__on_not_finite": "roll_back"}
    step = tmp_path / "step"
    settings |= {"transport__name": "shared_memory", "task__name": "test_judging:Once"}
    settings |= {"task__options": {"step": str(step)}}
    step.write_text("99")
    train_ranks(rank_pool, 2, job(tmp_path, **settings))
    whole = losses_of(tmp_path / "run")
    from_step_4 = str(tmp_path / "run" / "checkpoints" / "step-00000004")
    step.write_text("6")  # of this part: step 10
    ended = train_ranks(rank_pool, 2, job(tmp_path, **settings), resume=from_step_4)
    assert [one.kind for one in ended] == ["", ""], ended
    assert losses_of(tmp_path / "run") == whole


class Spoilt(Misbehaving):
    """In its so-many-th step in training a bias of all ranks becomes infinite, once."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step + 1

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses = super().loss(model, batch)
        self.left -= torch.is_grad_enabled()
        if self.left == 0 and torch.is_grad_enabled():
            self.left = -1
            assert Misbehaving.last_model is not None
            list(Misbehaving.last_model.parameters())[-1].data.fill_(math.inf)
        return losses


def test_spoilt_weights_are_not_gone_back_to(rank_pool: RankPool, tmp_path: Path) -> None:
    """They come in step 8, which is saved; step 9 shows it, and the run goes back to step 4 and ends as if nothing had been."""
    settings = {"checkpoint__every_steps": 4, "faults__on_not_finite": "roll_back", "transport__name": "shared_memory"}
    spoilt = {"task__name": "test_judging:Spoilt", "task__options": {"step": 8}}
    train_ranks(rank_pool, 3, job(tmp_path / "whole", **settings))
    ended = train_ranks(rank_pool, 3, job(tmp_path, **settings, **spoilt))
    assert [one.kind for one in ended] == [""] * 3, ended
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole" / "run")


def test_the_caps_count_over_restarts() -> None:
    before = Judge(FaultsSection(on_not_finite="skip", max_skipped_steps=3))
    for step in (1, 2):
        before.judge(rows(True, False), step, 0.0)
    after = Judge(before.section)
    after.load_state_dict(before.state_dict())
    after.judge(rows(True, False), 3, 0.0)
    with pytest.raises(DivergedError, match="after 3 steps in a row"):
        after.judge(rows(True, False), 4, 0.0)


def test_buffers_that_a_forward_assigns_anew_come_back() -> None:
    model = nn.BatchNorm1d(2)
    before = BuffersBefore(model)
    before.keep()
    model.running_mean = torch.full((2,), math.nan)
    before.bring_back()
    assert model.running_mean is not None and model.running_mean.tolist() == [0.0, 0.0]


def test_a_stop_in_the_very_step_that_is_rolled_back(rank_pool: RankPool, tmp_path: Path) -> None:
    """What the run went back to is there already; it goes on from it and ends as if nothing had been."""
    step = tmp_path / "step"
    settings = {"checkpoint__every_steps": 4, "faults__on_not_finite": "roll_back", "transport__name": "shared_memory"}
    settings |= {"task__name": "test_judging:Once", "task__options": {"step": str(step), "stops": True}}
    step.write_text("99")
    train_ranks(rank_pool, 2, job(tmp_path / "whole", **settings))
    step.write_text("11")
    stopped = train_ranks(rank_pool, 2, job(tmp_path, **settings))
    assert {(one.kind, one.step) for one in stopped} == {("StoppedError", 8)}, stopped
    step.write_text("99")
    ended = train_ranks(rank_pool, 2, job(tmp_path, **settings), resume="auto")
    assert [one.kind for one in ended] == ["", ""], ended
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole" / "run")
