"""Learning rates against values worked out by hand and against torch's own scheduler."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ddp.job import ScheduleSection
from ddp.training.schedules import learning_rate


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
