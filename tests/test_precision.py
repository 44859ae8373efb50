"""Narrow arithmetic, scaled losses, compiled models and activations computed again: what is trained and what is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddp.errors import JobFileError, UsageError
from ddp.job import PrecisionSection
from ddp.telemetry.records import StepRecord
from ddp.training.activation_checkpointing import checkpoint_activations
from ddp.training.precision import LossScale
from ddp.transport.row import StepRow
from ranks import RankPool
from training_runs import differences, job, saved, steps_of, train_ranks

STEPS = 30


def rows(finite: bool, loss: float = 1.0) -> list[StepRow]:
    bad = StepRow(4, math.inf, loss_sum=loss, finite=0.0)
    return [StepRow(4, 1.0, mean_squared_norm=1.0), StepRow(4, 1.0) if finite else bad]


def test_the_scale_moves_as_torchs_grad_scaler_moves_its_own() -> None:
    """With a growth interval of 3, over overflows alone, in a row, and just before the scale would grow."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    ours = LossScale.of(PrecisionSection(dtype="float16", initial_loss_scale=2.0**10, loss_scale_growth_steps=3))
    pattern = [True, True, False, False, True, True, True, True, True, False, True, True, True, True, True, True, True]
    for finite in pattern:
        weight.grad = torch.tensor([1.0 if finite else math.inf]) * theirs.get_scale()
        theirs.scale(torch.zeros(1))  # makes its scale a tensor
        theirs.step(optimizer)
        theirs.update()
        assert ours.overflowed(rows(finite)) is not finite
        assert ours.value == theirs.get_scale()


def test_what_is_not_the_scales_fault_is_left_to_the_judge() -> None:
    scale = LossScale.of(PrecisionSection(dtype="float16", initial_loss_scale=2.0))
    assert not scale.overflowed(rows(False, loss=math.nan)) and scale.value == 2.0
    assert scale.overflowed(rows(False)) and scale.value == 1.0
    assert not scale.overflowed(rows(False)) and scale.value == 1.0  # it overflows unscaled
    assert not LossScale().overflowed(rows(False))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precision__initial_loss_scale": 1000.0, "precision__dtype": "float16"}, "no power of two"),
        ({"precision__initial_loss_scale": 1024.0}, "not a setting of float32"),
        ({"precision__dtype": "bfloat"}, "bfloat16"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        job(tmp_path, **settings)


def run(pool: RankPool, folder: Path, world_size: int, **settings: Any) -> list[StepRecord]:
    """Digits with batch normalisation."""
    settings = {"run__steps": STEPS, "task__channels": 4, "global_batch_size": 48, "micro_batch_size": 12, **settings}
    here = job(folder, task__name="digits", evaluation__metric="accuracy", **settings)
    ended = train_ranks(pool, world_size, here, timeout=120)
    assert [one.kind for one in ended] == [""] * world_size, ended[0].message
    return steps_of(folder / "run")


def noise(records: Sequence[StepRecord]) -> tuple[float, float]:
    reading = records[-1].reading
    assert reading is not None and reading.observations >= 25
    return reading.variance_trace, reading.squared_norm


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.05), ("float16", 0.01)])
def test_narrow_arithmetic_trains_and_measures_nearly_the_same(
    rank_pool: RankPool, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    wide = run(rank_pool, tmp_path / "wide", 2)
    narrow = run(rank_pool, tmp_path / "narrow", 2, precision__dtype=dtype)
    assert [each.loss for each in narrow] == pytest.approx([each.loss for each in wide], rel=tolerance)
    assert [each.loss for each in narrow] != [each.loss for each in wide]
    assert noise(narrow) == pytest.approx(noise(wide), rel=2 * tolerance)
    assert narrow[0].gradient_norm == pytest.approx(wide[0].gradient_norm, rel=tolerance)


def test_steps_that_overflow_are_passed_over_on_all_ranks_until_the_scale_fits(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    settings = {"precision__dtype": "float16", "precision__loss_scale_growth_steps": 5}
    steep = run(rank_pool, tmp_path / "steep", 3, precision__initial_loss_scale=2.0**40, **settings)
    passed_over = sorted(set(range(1, STEPS + 1)) - {each.step for each in steep})
    assert passed_over[:2] == [1, 2] and 10 < len(passed_over) < 28  # from 2^40 down, and now and then for growing
    # A run in two parts keeps its scale: the same steps are passed over, with the same weights.
    for steps, resume in ((14, None), (STEPS, "auto")):
        here = {"run__steps": steps, "precision__initial_loss_scale": 2.0**40, **settings}
        ended = train_ranks(
            rank_pool,
            3,
            job(
                tmp_path / "parts",
                task__name="digits",
                evaluation__metric="accuracy",
                task__channels=4,
                global_batch_size=48,
                micro_batch_size=12,
                **here,
            ),
            resume=resume,
        )
        assert {one.kind for one in ended} == {""}
    whole, parts = (saved(tmp_path / folder / "run", STEPS, 3) for folder in ("steep", "parts"))
    assert whole["shared"]["loss_scale"] == parts["shared"]["loss_scale"]
    assert not differences(whole["shared"]["parameters"], parts["shared"]["parameters"])
    assert not differences(whole["own"], parts["own"])


def test_activations_computed_again_change_no_bit(rank_pool: RankPool, tmp_path: Path) -> None:
    """Dropout draws the same, running statistics move once; blocks by name, in and around each other."""
    kept = run(rank_pool, tmp_path / "kept", 2, task__dropout=0.3, run__steps=12)
    again = run(
        *(rank_pool, tmp_path / "again", 2),
        task__dropout=0.3,
        run__steps=12,
        precision__activation_checkpointing=["0", "1", "[4-9]"],
    )
    assert [each.loss for each in kept] == [each.loss for each in again]
    assert [each.reading for each in kept] == [each.reading for each in again]
    one, other = (saved(tmp_path / folder / "run", 12, 2) for folder in ("kept", "again"))
    assert not differences(one, other)


def test_fewer_activations_are_kept_for_backward() -> None:
    def kept_bytes(patterns: list[str]) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.BatchNorm1d(32)) for _ in range(6)))
        checkpoint_activations(model, patterns)
        sizes: list[int] = []
        weights = {each.data_ptr() for each in model.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(torch.randn(64, 32, requires_grad=True)).square().sum()
        total = sum(sizes)
        loss.backward()
        return total

    assert kept_bytes(["?"]) < 0.5 * kept_bytes([])


def test_a_pattern_that_matches_nothing_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"activation_checkpointing: 'blok.\*' names nothing of the model.*it has 0"):
        checkpoint_activations(model, ["blok.*"])


def test_a_compiled_model_trains_the_same_and_is_measured(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {"task__batch_norm": False, "global_batch_size": 24, "micro_batch_size": 12}
    plain = run(rank_pool, tmp_path / "plain", 2, **settings)
    compiled = run(rank_pool, tmp_path / "compiled", 2, precision__compile=True, **settings)
    assert [each.loss for each in compiled] == pytest.approx([each.loss for each in plain], rel=1e-3)
    assert noise(compiled) == pytest.approx(noise(plain), rel=1e-2)


@pytest.mark.filterwarnings("ignore")  # torch's own, where compiled code ends and goes on
def test_a_compiled_model_may_compute_activations_again() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), nn.Linear(4, 2))
    both = copy.deepcopy(plain)
    checkpoint_activations(both, ["0"], compiled=True)
    both.compile(backend="eager")
    inputs = torch.randn(5, 3)
    for model in (plain, both):
        model(inputs).square().sum().backward()
    for one, other in zip(plain.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
