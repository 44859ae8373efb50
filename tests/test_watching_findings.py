"""What is said of layers and curves, from numbers alone: planted faults are named, healthy ones are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ddp.watching.cadence import AIM, SECOND_LOOK, Cadence
from ddp.watching.curve_findings import curve_findings
from ddp.watching.finding import Finding, listed, title_of
from ddp.watching.gap_findings import Pair, gap_findings
from ddp.watching.histogram import bin_of_code, bins, codes, edges, shift
from ddp.watching.layer_findings import Situation, layer_findings
from ddp.watching.layers import LayerStatistics
from ddp.watching.loss_curve import MOST_STRETCHES, LossCurve

HEALTHY = LayerStatistics("conv", "Conv2d", weight_norm=3.0, update_norm=0.003, gradient_norm=0.5, activation_std=0.6)
RELU = LayerStatistics("act", "ReLU", after="conv", activation_std=0.5, units=32, dead_units=2, examples=256)
TANH = LayerStatistics("tanh", "Tanh", after="conv", activation_std=0.9, units=32, saturated_units=1, examples=256)
HEAD = replace(HEALTHY, name="head", kind="Linear", is_output=True)
LEARNING = Situation(loss_share=0.8)


def titles(findings: list[Finding]) -> list[str]:
    return [finding.title for finding in findings]


def look(**changes: LayerStatistics) -> tuple[LayerStatistics, ...]:
    return tuple(changes.get(layer.name, layer) for layer in (HEALTHY, RELU, TANH, HEAD))


def scaled(factor: float) -> tuple[LayerStatistics, ...]:
    return tuple(replace(each, update_norm=factor * each.update_norm) for each in look())


def test_healthy_layers_are_not_talked_about() -> None:
    for factor in (0.1, 1.0, 30.0):
        assert layer_findings([scaled(factor)] * 3, LEARNING) == []
    assert layer_findings([], LEARNING) == []


@pytest.mark.parametrize(
    ("factor", "situation", "expected"),
    [
        (150.0, LEARNING, ["updates too large"]),
        (1 / 150, LEARNING, ["updates too small"]),
        (0.0, LEARNING, ["updates too small"]),
        (1 / 150, Situation(0.1), []),  # nearly learned
        (1 / 150, Situation(0.8, rate_share=0.001), []),  # the schedule is at its end
        (1 / 150, Situation(0.8, rate_rises=True), []),  # warming up
        (1 / 150, Situation(math.nan), []),
    ],
)
def test_a_rate_a_hundred_times_off_is_named(factor: float, situation: Situation, expected: list[str]) -> None:
    assert titles(layer_findings([scaled(factor)] * 2, situation)) == expected
    assert layer_findings([scaled(factor)], situation) == []  # one look may be chance
    assert titles(layer_findings([scaled(800.0)], situation)) == ["updates too large"]  # not that one
    assert layer_findings([scaled(1.0), scaled(factor)], situation) == []


def test_the_sentence_has_the_layers_and_the_numbers() -> None:
    (found,) = layer_findings([scaled(150.0)] * 2, LEARNING)
    assert "150 times" in found.text and "conv, head" in found.text and "learning rate is too high" in found.text
    assert title_of(found.sentence) == found.title
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_dead_and_saturated_layers_are_named() -> None:
    dead, flat = replace(RELU, dead_units=32), replace(TANH, saturated_units=20)
    found = layer_findings([look(act=dead, tanh=flat)], LEARNING)
    assert titles(found) == ["dead units in act", "saturated units in tanh"]
    assert "all 32 units of act (ReLU after conv)" in found[0].text
    assert "20 of 32 units (62 %)" in found[1].text
    few = replace(dead, examples=12)
    assert layer_findings([look(act=few)], LEARNING) == []  # may well be alive for the next examples
    assert layer_findings([look(tanh=replace(flat, is_output=True))], LEARNING) == []  # a sure answer saturates


def test_signals_that_vanish_and_explode() -> None:
    for std, what in ((1e-6, "vanish"), (1e6, "explode")):
        one = [look(conv=replace(HEALTHY, activation_std=std))] * 2
        assert titles(layer_findings(one, LEARNING)) == [f"activations {what}"]
    zero = [look(conv=replace(HEALTHY, activation_std=0.0))] * 2
    assert layer_findings(zero, LEARNING) == []  # a branch that is initialised with zeros
    faint = [look(conv=replace(HEALTHY, gradient_norm=1e-7))] * 2
    assert titles(layer_findings(faint, LEARNING)) == ["gradients vanish towards the input"]
    still = [(replace(HEALTHY, name="stem", update_norm=1e-9), *look())] * 2
    assert titles(layer_findings(still, LEARNING)) == ["stem hardly moves"]


def curve(losses: Callable[[int], float], steps: int) -> LossCurve:
    made = LossCurve()
    for step in range(1, steps + 1):
        made.observe(step, losses(step))
    return made


def noisy(level: float, seed: int = 1) -> Callable[[], float]:
    source = random.Random(seed)
    return lambda: source.gauss(0.0, level)


@pytest.mark.parametrize(
    ("shape", "ratio", "expected"),
    [
        (lambda step: 2.3 * math.exp(-step / 80) + 0.05, 1e-3, []),  # as it should be
        (lambda step: 2.3 * (step + 5) ** -0.3, 1e-3, []),  # a power law, as language models have
        (lambda step: 2.3 - 0.001 * step, 1e-4, ["the loss falls in a line"]),
        (lambda step: 2.3 - 0.001 * step, 1e-3, []),  # whatever it is, the rate is not to blame
        (lambda step: 2.3, 1e-3, ["the loss does not fall"]),
        (lambda step: 2.3 * math.exp(step / 60), 1e-3, ["the loss explodes"]),
        (lambda step: 1.0 + 1.3 * math.exp(-step / 8), 0.1, ["the loss stands on a plateau"]),
        (lambda step: 1.0 + 1.3 * math.exp(-step / 8), 1e-3, []),  # noise that no model explains
        (lambda step: -3.0 - step, 1e-3, []),  # a logarithm of densities has no scale
    ],
)
def test_shapes_of_the_loss(shape: Callable[[int], float], ratio: float, expected: list[str]) -> None:
    noise = noisy(0.02)
    found = curve_findings(curve(lambda step: shape(step) + noise(), 400), ratio)
    assert titles(found) == expected


def test_a_small_batch_wiggles() -> None:
    noise = noisy(1.2)
    falling = curve(lambda step: 1.0 * math.exp(-step / 100) + 1.5 + noise(), 400)
    assert titles(curve_findings(falling, 1e-3)) == ["the loss wiggles"]
    assert falling.wiggle(0.0, 1.0) == pytest.approx(1.2, rel=0.1)


def test_the_curve_stays_small_and_exact() -> None:
    source = random.Random(2)
    losses = [source.random() for _ in range(3_000)]
    made = curve(lambda step: losses[step - 1], 3_000)
    assert len(made.state_dict()["stretches"]) <= MOST_STRETCHES
    assert made.steps == 3_000 and made.start == pytest.approx(np.mean(losses[:3]))
    assert made.mean(0.0, 1.0) == pytest.approx(np.mean(losses))
    assert made.wiggle(0.0, 1.0) == pytest.approx(np.std(losses), rel=0.05)
    assert made.latest(16) == pytest.approx(np.mean(losses[-24:]), abs=0.2)


def test_a_curve_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    def losses(step: int) -> float:
        return 1 / step + 0.1 * math.sin(step)

    whole, part = curve(losses, 700), curve(losses, 400)
    resumed = LossCurve()
    resumed.load_state_dict(part.state_dict())
    for step in range(401, 701):
        resumed.observe(step, losses(step))
    assert resumed.state_dict() == whole.state_dict()
    part.observe(401, math.nan)  # a step that was passed over
    assert part.steps == 400
    part.forget_after(200)
    assert part.steps == 200
    late = LossCurve()
    late.observe(10_000, 1.0)  # a checkpoint that knew nothing of curves
    assert curve_findings(late, math.nan) == [] and late.steps == 1


def pairs(count: int, training: Callable[[int], float], gap: Callable[[int], float]) -> list[Pair]:
    """Accuracies at evaluations 1, 2, ...; losses are the errors."""
    return [
        Pair(10 * i, 1000, 1 - training(i), 1 - training(i) + gap(i), training(i), training(i) - gap(i))
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("training", "gap", "expected"),
    [
        (lambda i: 1 - 0.5 / i, lambda i: 0.02, []),
        (lambda i: 1 - 0.5 / i, lambda i: 0.25, ["large gap between training and validation"]),
        (lambda i: 0.6, lambda i: 0.01, ["training and validation accuracy stand still, and low"]),
        (lambda i: 0.5 + 0.02 * i, lambda i: 0.01, []),
        (lambda i: 1 - 0.5 / i, lambda i: 0.05 * i, ["validation loss rises while training loss falls"]),
        (lambda i: 0.9 - 0.04 * i, lambda i: 0.01, ["training error rises"]),
    ],
)
def test_training_against_validation(
    training: Callable[[int], float], gap: Callable[[int], float], expected: list[str]
) -> None:
    found = titles(gap_findings(pairs(8, training, gap), start_loss=1.0))
    assert set(expected) <= set(found) and (expected or not found)
    assert gap_findings(pairs(1, training, gap), start_loss=1.0) == []


def test_losses_alone_tell_of_overfitting() -> None:
    """Of a task without an accuracy; small rises of small losses are nothing."""
    plain = [Pair(i, 100, 1 / i, 0.5 + 0.1 * abs(i - 3)) for i in range(1, 9)]
    assert titles(gap_findings(plain, 1.0)) == ["validation loss rises while training loss falls"]
    assert gap_findings(plain, 100.0) == []
    assert gap_findings(plain, math.nan) == []


@pytest.mark.parametrize("bins_per_octave", [1, 2, 4])
def test_the_bins_are_those_of_their_edges(bins_per_octave: int) -> None:
    """Against numpy's comparison with the edges, over all magnitudes and on the edges themselves."""
    source = np.random.default_rng(3)
    spread = source.standard_normal(20_000) * 10.0 ** source.integers(-14, 8, 20_000)
    corners = [0.0, -0.0, 1.0, -1.0, 2.0**-40, -(2.0**-40), 2.0**16, -(2.0**16), 1e30, -1e30, 1e-44]
    values = np.concatenate([spread, corners, edges(bins_per_octave)]).astype(np.float32)
    code = (values.view(np.uint32) >> shift(bins_per_octave)) & (codes(bins_per_octave) - 1)
    at = edges(bins_per_octave)
    rising, falling = np.digitize(values, at) - 1, np.digitize(values, at, right=True) - 1
    expected = np.clip(np.where(values >= 0, rising, falling), 0, bins(bins_per_octave) - 1)
    np.testing.assert_array_equal(bin_of_code(bins_per_octave)[code], expected)
    odd = np.array([np.inf, -np.inf, np.nan], dtype=np.float32).view(np.uint32) >> shift(bins_per_octave)
    assert (bin_of_code(bins_per_octave)[odd & (codes(bins_per_octave) - 1)] == bins(bins_per_octave)).all()


def test_looks_cost_a_fixed_share_and_come_less_often() -> None:
    cadence, looks = Cadence("auto"), list[int]()
    for step in range(1, 20_001):
        if cadence.is_due(step):
            looks.append(step)
            cadence.looked(step, 0.004 if step > 1 else 0.1, 0.01 if step > 1 else math.nan)
    assert looks[:3] == [1, 1 + SECOND_LOOK, 1 + SECOND_LOOK + math.ceil(0.4 / AIM)]
    assert 0.4 * len(looks) / 20_000 < 0.01
    cheap, seen = Cadence("auto"), list[int]()
    for step in range(1, 20_001):
        if cheap.is_due(step):
            seen.append(step)
            cheap.looked(step, 1e-9, 0.01)
    assert seen[-1] - seen[-2] == seen[-1] // 200  # not for lack of time, but so that a file stays small
    fixed = Cadence(7)
    assert [step for step in range(1, 30) if fixed.is_due(step)] == [1, 7, 14, 21, 28]
