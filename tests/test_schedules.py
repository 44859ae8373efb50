"""Learning rates and their rules against values worked out by hand and against torch's own schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    StepLR,
)

from ddp.job import OptimizerSection, ScheduleSection, parse_job
from ddp.noise.learning_rate import gain, rate_factor
from ddp.noise.noise_scale import Reading, State
from ddp.training.plateau import Plateau
from ddp.training.schedules import LearningRate, learning_rate, momentum


def rates(steps: int, peak: float, **settings: object) -> list[float]:
    section = ScheduleSection.model_validate(settings)
    return [learning_rate(step, steps, peak, section) for step in range(1, steps + 1)]


def test_constant() -> None:
    assert rates(3, 0.5) == [0.5, 0.5, 0.5]


def test_warm_up_rises_in_equal_parts_and_never_starts_at_zero() -> None:
    assert rates(6, 0.8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_cosine_goes_from_the_peak_to_the_final_fraction() -> None:
    # cos of 0, 45, 90, 135, 180 degrees
    half = 0.5**0.5
    expected = [1.0, 0.2 + 0.8 * (1 + half) / 2, 0.6, 0.2 + 0.8 * (1 - half) / 2, 0.2]
    assert rates(5, 1.0, name="cosine", final_fraction=0.2) == pytest.approx(expected, rel=1e-14)
    assert rates(5, 1.0, name="cosine")[-1] == 0.0


def test_cosine_after_warm_up_equals_torchs() -> None:
    steps, warmup, peak, final = 37, 5, 0.3, 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=final * peak)
    expected: list[float] = []
    for _ in range(steps - warmup + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    got = rates(steps, peak, name="cosine", warmup_steps=warmup, final_fraction=final)
    assert got[warmup - 1 :] == pytest.approx(expected, rel=1e-9)
    assert got[: warmup - 1] == pytest.approx([peak * k / warmup for k in range(1, warmup)])


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_degenerate_lengths_stay_finite(name: str) -> None:
    assert rates(1, 0.5, name=name, final_fraction=0.1) == [0.5]
    assert rates(2, 0.5, name=name, warmup_steps=4) == [0.125, 0.25]
    assert rates(4, 0.5, name=name, warmup_steps=4)[-1] == 0.5
    section = ScheduleSection.model_validate({"name": "cosine", "final_fraction": 0.25})
    assert learning_rate(99, 10, 1.0, section) == 0.25


def rate_of(batch: int = 16, **settings: Any) -> LearningRate:
    """Of a run that began with `batch` examples a step, 10 steps an epoch."""
    table: dict[str, Any] = {
        "run": {"steps": 40},
        "task": {"name": "digits"},
        "batch": {"global_batch_size": batch},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
    }
    for name, value in settings.items():
        section, key = name.split("__")
        table.setdefault(section, {})[key] = value
    if "run__epochs" in settings:
        del table["run"]["steps"]
    return LearningRate(parse_job(table), first_batch_size=batch, first_steps_per_epoch=10)


def reading(noise_scale: float, state: State = "resolved") -> Reading:
    return Reading(state, noise_scale, noise_scale, noise_scale, 2.0, 2.0 * noise_scale, 50, 50, 0.0, False)


def test_at_the_tuned_batch_size_the_rate_is_the_schedules() -> None:
    for rule in ("auto", "none", "linear", "sqrt", "noise_scale", "adascale"):
        settings = {"schedule__name": "cosine", "schedule__warmup_steps": 4, "optimizer__learning_rate_rule": rule}
        rate = rate_of(**settings)
        expected = rates(40, 0.1, name="cosine", warmup_steps=4)
        assert [rate.advance(16, 10, reading(30.0 + step)) for step in range(40)] == expected
        assert rate.is_over(40, 4)


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        ("none", "sgd", 1.0),
        ("linear", "sgd", 4.0),
        ("sqrt", "adam", 2.0),
        ("noise_scale", "sgd", (1 + 48 / 16) / (1 + 48 / 64)),
        ("auto", "adam", ((1 + 48 / 16) / (1 + 48 / 64)) ** 0.5),
        ("adascale", "sgd", (96 / 16 + 2) / (96 / 64 + 2)),
    ],
)
def test_another_batch_size_rescales_it_by_the_rule(rule: str, name: str, expected: float) -> None:
    rate = rate_of(64, optimizer__tuned_batch_size=16, optimizer__learning_rate_rule=rule, optimizer__name=name)
    assert rate.advance(64, 10, reading(48.0)) == pytest.approx(0.1 * expected)
    assert rate.factor(16) == 1.0


def test_while_no_noise_scale_is_resolved_the_root_stands_in_and_then_the_last_one_counts() -> None:
    rate = rate_of(64, optimizer__tuned_batch_size=16)
    assert rate.advance(64, 10, None) == pytest.approx(0.2)
    assert rate.advance(64, 10, reading(48.0, "wide")) == pytest.approx(0.2)
    resolved = rate.advance(64, 10, reading(48.0))
    assert resolved == pytest.approx(0.1 * 4 / 1.75)
    assert rate.advance(64, 10, reading(1e6, "lower_bound")) == resolved


def test_in_epochs_the_schedule_ends_with_the_last_one_whatever_the_batch_does() -> None:
    rate = rate_of(run__epochs=3, schedule__name="cosine", optimizer__learning_rate_rule="none")
    for share in (0.1, 0.3, 0.6, 0.5, 0.5, 1.0):  # of an epoch, a step
        last = rate.advance(16, 1 / share, None)
    assert rate.position == pytest.approx(30) and last == pytest.approx(0.0, abs=1e-15)
    assert not rate.is_over(5, 2) and rate.is_over(6, 3)
    again = rate_of(run__epochs=3, schedule__name="cosine", optimizer__learning_rate_rule="none")
    assert [again.advance(16, 10, None) for _ in range(30)] == rates(30, 0.1, name="cosine")


def test_adascale_counts_steps_at_the_tuned_batch_size_and_ends_when_they_are_done() -> None:
    rate = rate_of(
        64, optimizer__tuned_batch_size=16, optimizer__learning_rate_rule="adascale", schedule__name="cosine"
    )
    one = (48 / 16 + 1) / (48 / 64 + 1)  # S/b0 + |G|^2 over S/b + |G|^2, both over |G|^2
    for step in range(1, 18):
        got = rate.advance(64, 10, reading(48.0, "wide"))
        assert got == pytest.approx(one * learning_rate(step * one, 40, 0.1, ScheduleSection(name="cosine")))
        assert not rate.is_over(step, 0)
    rate.advance(64, 10, reading(48.0))
    assert rate.is_over(18, 1)  # 18 * 2.29 > 40
    epochs = rate_of(64, optimizer__tuned_batch_size=16, optimizer__learning_rate_rule="adascale", run__epochs=2)
    assert epochs.length == 80  # 2 epochs of 10 steps of 64, in steps of 16


def test_a_resumed_run_keeps_what_its_rate_was_tuned_at() -> None:
    rate = rate_of(16, schedule__name="cosine", run__epochs=4)
    for _ in range(7):
        rate.advance(16, 10, reading(48.0))
    again = rate_of(32, schedule__name="cosine", run__epochs=4)  # on twice as many ranks
    again.first_steps_per_epoch = 5
    again.load_state_dict(rate.state_dict())
    assert again.tuned_batch_size == 16 and again.length == 40
    expected = learning_rate(9, 40, 0.1, ScheduleSection(name="cosine")) * (1 + 48 / 16) / (1 + 48 / 32)
    assert again.advance(32, 5, None) == pytest.approx(expected)


def test_the_factors_meet_their_limits() -> None:
    assert rate_factor("noise_scale", 16, 64, 0.0) == 1.0  # no noise: a larger batch is worth nothing
    assert rate_factor("noise_scale", 16, 64, math.inf) == 4.0  # all noise: linear
    assert rate_factor("noise_scale", 64, 16, math.inf, exponent=0.5) == 0.5
    assert gain(-1.0, 2.0, 16, 64) == 1.0 and gain(1.0, -2.0, 16, 64) == 4.0
    assert gain(math.nan, math.nan, 16, 64) == gain(0.0, 0.0, 16, 64) == 1.0
    with pytest.raises(ValueError, match="not negative"):
        rate_factor("noise_scale", 16, 64, -1.0)
    with pytest.raises(ValueError, match="above 0"):
        rate_factor("linear", 0, 64)


def torch_rates(scheduler: Callable[[Optimizer], LRScheduler], steps: int, peak: float = 0.3) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    stepped, found = scheduler(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepped.step()
    return found


TORCHS: dict[str, tuple[dict[str, Any], Callable[[Optimizer], LRScheduler]]] = {
    "step": ({"step_every_steps": 7, "factor": 0.3}, lambda o: StepLR(o, 7, gamma=0.3)),
    "exponential": ({"decay_steps": 1, "factor": 0.95}, lambda o: ExponentialLR(o, gamma=0.95)),
    "inverse_time": ({"decay_steps": 5}, lambda o: LambdaLR(o, lambda n: 1 / (1 + n / 5))),
    "1/t": ({"decay_steps": 1}, lambda o: LambdaLR(o, lambda n: 1 / (1 + n))),
    "constant": ({}, lambda o: ConstantLR(o, factor=1.0)),
    "cosine": ({"final_fraction": 0.1}, lambda o: CosineAnnealingLR(o, T_max=39, eta_min=0.03)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_every_schedule_is_torchs_step_by_step_also_in_epochs_and_after_warm_up(name: str) -> None:
    own, scheduler = TORCHS[name]
    expected = torch_rates(scheduler, 40)
    assert rates(40, 0.3, name=name, **own) == pytest.approx(expected, rel=1e-12)
    in_epochs = {
        key.replace("_steps", "_epochs"): value / 8 if "_steps" in key else value for key, value in own.items()
    }
    section = ScheduleSection.model_validate({"name": name, **in_epochs, "warmup_epochs": 0.75})
    got = [learning_rate(step, 45, 0.3, section, steps_per_epoch=8) for step in range(1, 46)]
    assert got[:5] == pytest.approx([0.3 * step / 6 for step in range(1, 6)], rel=1e-12)
    assert got[5:] == pytest.approx(expected, rel=1e-12)


def test_a_step_schedule_in_epochs_falls_between_epochs_whatever_the_batch_makes_of_them() -> None:
    rate = rate_of(run__epochs=6, schedule__name="step", schedule__step_every_epochs=2.0)
    found = [rate.advance(16, 7, None) for _ in range(42)]  # resumed with a batch of which 7 make an epoch
    assert found == pytest.approx([0.1] * 14 + [0.01] * 14 + [0.001] * 14)


@pytest.mark.parametrize("goal", ["min", "max"])
@pytest.mark.parametrize(
    "settings", [{}, {"cooldown": 3}, {"threshold": 0.05, "threshold_mode": "absolute"}, {"min_learning_rate": 2e-3}]
)
def test_plateau_is_torchs_step_by_step_and_goes_on_after_a_resume(goal: Any, settings: dict[str, Any]) -> None:
    section = ScheduleSection.model_validate({"name": "plateau", "factor": 0.4, "patience": 2, **settings})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    torchs = ReduceLROnPlateau(
        *(optimizer, goal, 0.4, 2),
        threshold=section.threshold,
        threshold_mode="rel" if section.threshold_mode == "relative" else "abs",
        cooldown=section.cooldown,
        min_lr=section.min_learning_rate,
    )
    plateau, falls = Plateau(section, goal, peak=0.3), 0
    random = np.random.default_rng(5)
    values = [2 / (1 + step / 9) + 0.05 * random.normal() for step in range(70)]
    values[20:23] = [math.nan, math.inf, -math.inf if goal == "max" else math.inf]
    for step, value in enumerate(values if goal == "min" else [-value for value in values]):
        torchs.step(value)
        falls += plateau.observe(step, value)
        assert not plateau.observe(step, value)  # a second time counts for nothing
        assert 0.3 * plateau.scale == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        if step % 10 == 4:
            again = Plateau(section, goal, peak=0.3)
            again.load_state_dict(plateau.state_dict())
            plateau = again
    assert falls >= 3
    for broken in ({"scale": "x"}, {"scale": 2.0}, {"best": None}, {"cooldown_left": -5}):
        with pytest.raises(ValueError, match="a plateau"):
            plateau.load_state_dict({**plateau.state_dict(), **broken})


def test_momentum_is_torchs_linear_factor_and_ends_where_it_should() -> None:
    section = OptimizerSection(name="momentum", momentum=0.5, final_momentum=0.99, momentum_steps=8)
    expected = torch_rates(lambda o: LinearLR(o, 0.5 / 0.99, 1.0, total_iters=8), 12, peak=0.99)
    assert [momentum(step, section) for step in range(1, 13)] == pytest.approx(expected, rel=1e-12)
    assert momentum(9, section) == 0.99 and momentum(0.3, section) == 0.5
    epochs = OptimizerSection(name="adamw", betas=(0.8, 0.9), final_momentum=0.6, momentum_epochs=0.5)
    assert [momentum(step, epochs, 4) for step in (1, 2, 3, 4)] == pytest.approx([0.8, 0.7, 0.6, 0.6])
    assert momentum(7, OptimizerSection(name="adagrad")) == 0.0
