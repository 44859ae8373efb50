"""A trial against exact answers: curves of the quadratic, a plain loop over the whole batch, enumerated noise scales."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddp.errors import UsageError
from ddp.job import parse_job
from ddp.noise.moments import Moments
from ddp.search.curve import DENSE_STEPS, HALF_WIDTH, loss_after, next_look, smoothed, steps_to_targets, value_at
from ddp.search.gradient_noise import GradientSums, adam_preconditioner, average_noise_scale, squared_norm
from ddp.search.request import Trial
from ddp.search.store import TrialResult
from ddp.search.sweep_file import Sweep, SweepSection
from ddp.search.training_step import TrainingStep, stream
from ddp.search.trial import run_trial
from ddp.search.workload import SubsetLoss, Workload, load_workload
from ddp.tasks.synthetic import start
from ddp.training.data import BatchPlan
from ddp.training.optimizers import build_optimizer


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workload(
    task: dict[str, Any], optimizer: dict[str, Any], batch: dict[str, Any] | None = None, **sweep: Any
) -> Workload:
    metric = {"digits": "accuracy", "quadratic": "distance"}[task["name"]]
    job = parse_job(
        {
            "run": {"steps": 1},
            "task": task,
            "batch": batch or {"global_batch_size": 64},
            "optimizer": optimizer,
            "evaluation": {"metric": metric},
        }
    )
    section = SweepSection.model_validate({"subset_examples": 32, "batch_sizes": [4, 16, 32, 64, 256], **sweep})
    return load_workload(Sweep(section, job, "sweep"), allow_import=())


def bowl(**options: Any) -> dict[str, Any]:
    return {"name": "quadratic", "dimension": 1024, "noise": 1.0, "distance": 16.0, **options}


def run(load: Workload, batch_size: int, rate: float, *targets: float, seed: int = 0, steps: int = 4000) -> TrialResult:
    return run_trial(load, Trial("sweep", batch_size, rate, seed, targets, steps))


def exact_losses(rate: float, batch_size: int, steps: int, condition: float = 1.0) -> np.ndarray[Any, Any]:
    """E L after 0, 1, ... steps of SGD on the bowl above: each axis by itself, in float64."""
    curvature = condition ** -np.linspace(0, 1, 1024)
    square = start(1024, 16.0).double().numpy() ** 2
    losses: list[float] = []
    for _ in range(steps + 1):
        losses.append(0.5 * float((curvature * square).sum()))
        square = (1 - rate * curvature) ** 2 * square + rate**2 / batch_size
    return np.array(losses)


@pytest.mark.parametrize(("batch_size", "rate", "condition"), [(4, 0.002, 1.0), (48, 0.02, 1.0), (256, 0.03, 30.0)])
def test_a_quadratic_is_run_down_in_the_steps_it_must_take(batch_size: int, rate: float, condition: float) -> None:
    load = workload(bowl(condition_number=condition), {"name": "sgd", "learning_rate": 1.0})
    exact = exact_losses(rate, batch_size, 3000, condition)
    targets = (0.7 * exact[0], 0.45 * exact[0])
    result = run(load, batch_size, rate, *targets)
    assert result.stopped_because == "targets"
    for target, steps in zip(targets, result.steps_to_target, strict=True):
        expected = np.interp(-target, -exact, np.arange(len(exact)))
        assert steps == pytest.approx(expected, rel=0.02)
        assert result.examples_to_target[result.targets.index(target)] == pytest.approx(batch_size * steps)
    for metric, loss in zip(result.validation_metric_at_target, result.validation_loss_at_target, strict=True):
        assert condition > 1 or metric == pytest.approx(math.sqrt(2 * loss), rel=1e-3)
    assert result.validation_loss_at_target == pytest.approx(targets, rel=0.03)


@pytest.mark.parametrize("rate", [0.06, 0.12, 0.24])
def test_adam_does_not_swing_through_the_bottom_of_the_bowl(rate: float) -> None:
    """A target that is passed on the way to the other side is not reached: nothing that a batch size could be judged by."""
    task = {"name": "quadratic", "dimension": 64, "noise": 0.0, "distance": 8.0, "condition_number": 100.0}
    result = run(workload(task, {"name": "adam", "learning_rate": rate}), 64, rate, 0.05)
    assert result.steps_to_target[0] > 20


def test_the_noise_scale_on_the_way_is_the_average_by_the_weights_of_the_design() -> None:
    load, rate, batch_size = workload(bowl(), {"name": "sgd", "learning_rate": 1.0}), 0.02, 16
    result = run(load, batch_size, rate, 64.0)
    losses = exact_losses(rate, batch_size, int(result.steps_to_target[0]))
    noise = 1024 / (2 * losses)  # tr(Sigma) / |G|^2
    weight = 1 / (1 + noise / batch_size)
    assert result.noise_plain[0] == pytest.approx((weight * noise).sum() / weight.sum(), rel=0.05)
    assert all(map(math.isnan, result.noise_preconditioned))


def test_with_the_rate_of_the_noise_scale_steps_are_the_hyperbola_of_theory() -> None:
    """L = |theta|^2/2, rate k/(1 + B/b): S_min = ln(L0/L*)/(2k), E_min = sigma^2 D (1/L* - 1/L0)/(4k) as k -> 0."""
    load = workload(bowl(), {"name": "sgd", "learning_rate": 0.02}, learning_rate_rule="noise_scale")
    first, target, k = 128.0, 40.0, 0.02
    smallest_steps = math.log(first / target) / (2 * k)
    smallest_examples = 1024 * (1 / target - 1 / first) / (4 * k)
    for batch_size in (4, 16, 256):
        steps = run(load, batch_size, k, target).steps_to_target[0]
        assert steps == pytest.approx(smallest_steps + smallest_examples / batch_size, rel=0.04)


def test_a_step_is_that_of_the_whole_batch_at_once() -> None:
    """Micro-batches, sampled steps, clipping and warm-up against a loop that knows nothing of them."""
    options = {"name": "sgd", "learning_rate": 0.2, "momentum": 0.9, "gradient_clip_norm": 1.5}
    load = workload({"name": "digits", "batch_norm": False, "channels": 4}, options, micro_batch_size=7)
    for batch_size in (5, 70):
        torch.manual_seed(0)
        model, reference = load.task.model(), load.task.model()
        reference.load_state_dict(model.state_dict())
        steps = TrainingStep(load, Trial("sweep", batch_size, 0.2, 3, (1.0,), 10), model)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9)
        examples = stream(load.training_examples, load.sweep.job.run.seed + 3, batch_size)
        for step in range(1, 26):
            assert steps.take(step)
            batch = load.training.__getitems__(next(examples))  # type: ignore[attr-defined]
            optimizer.zero_grad()
            load.task.loss(reference, batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.5)
            optimizer.step()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


def test_batches_of_one_size_follow_the_order_of_a_training_run() -> None:
    batches = stream(10, 5, 4)
    taken = [next(batches) for _ in range(7)]
    plan = BatchPlan(10, 4, 4, 1, 5)
    assert [example for batch in taken for example in batch] == [*plan.order(0), *plan.order(1), *plan.order(2)][:28]
    assert all(len(batch) == 4 for batch in taken)


def test_batch_statistics_are_those_of_the_jobs_micro_batch() -> None:
    load = workload(
        {"name": "digits", "channels": 4}, {"name": "sgd"}, {"global_batch_size": 64, "micro_batch_size": 16}
    )
    model = load.task.model()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    steps = TrainingStep(load, Trial("sweep", 96, 0.1, 0, (1.0,), 10), model)
    assert steps.take(1) and steps.take(2)
    assert set(seen) == {16}
    small = TrainingStep(load, Trial("sweep", 8, 0.1, 0, (1.0,), 10), model)
    seen.clear()
    assert small.take(1)
    assert set(seen) == {8}
    assert len(small.plain) == 1


def test_the_subset_loss_does_not_lag_behind_the_weights() -> None:
    """With batch statistics it is the loss of training at these weights, whatever the running ones were."""
    load = workload({"name": "digits", "channels": 4}, {"name": "sgd"}, subset_examples=60, micro_batch_size=20)
    model = load.task.model()
    subset = SubsetLoss(load, model, unit_examples=20)
    first = subset.loss()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.momentum == 0.1
            module.running_mean.fill_(7.0)
    assert subset.loss() == first
    model.train()
    with torch.no_grad():
        losses = [load.task.loss(model, batch) for batch in subset._batches]
    assert [len(each) for each in losses] == [20, 20, 20]
    assert float(torch.cat(losses).mean()) == pytest.approx(first, rel=1e-6)


def test_moments_of_a_sample_are_unbiased() -> None:
    """Against the enumerated gradients of a data set, plain and preconditioned, drawing without replacement."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(40, 6, generator=generator) + 0.4
    weight = torch.rand(6, generator=generator) + 0.2
    sums = {"plain": [0.0, 0.0], "preconditioned": [0.0, 0.0]}
    draws = 4000
    for _ in range(draws):
        chosen = torch.randperm(40, generator=generator)[:11]
        sample = GradientSums([weight[:4], weight[4:]])
        for part in (chosen[:2], chosen[2:7], chosen[7:]):
            mean = gradients[part].mean(dim=0)
            sample.add([mean[:4], mean[4:]], len(part))
        for name, moments in zip(sums, sample.moments(40), strict=True):
            assert moments is not None
            sums[name][0] += moments.squared_norm / draws
            sums[name][1] += moments.variance_trace / draws
    for name, scale in (("plain", torch.ones(6)), ("preconditioned", weight)):
        whole, centred = gradients.mean(dim=0), gradients - gradients.mean(dim=0)
        assert sums[name][0] == pytest.approx(float((scale * whole.square()).sum()), rel=0.03)
        assert sums[name][1] == pytest.approx(float((scale * centred.square()).sum()) / 39, rel=0.03)


def test_the_preconditioner_is_adams_own() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    section = workload(bowl(dimension=2), {"name": "adam", "learning_rate": 0.1}).sweep.job.optimizer
    optimizer = build_optimizer(section, [parameter])
    assert adam_preconditioner(optimizer, [parameter]) is None
    before, squares = parameter.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, -4.0])):
        parameter.grad = gradient.clone()
        squares = 0.999 * squares + 0.001 * gradient.square()
        optimizer.step()
    (preconditioner,) = adam_preconditioner(optimizer, [parameter]) or []
    torch.testing.assert_close(preconditioner, 1 / ((squares / (1 - 0.999**2)).sqrt() + 1e-8), rtol=1e-4, atol=0.0)
    assert not torch.equal(parameter, before)
    assert squared_norm([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.5])]) == pytest.approx(17.0)


def test_windows_whose_signal_is_lost_in_noise_do_not_spoil_the_average() -> None:
    clear = [(step, Moments(squared_norm=2.0, variance_trace=20.0)) for step in range(1, 101)]
    assert average_noise_scale(clear, 100, 8) == pytest.approx(10.0)
    noisy = [(step, Moments(2.0 + 30 * (-1) ** step, 20.0)) for step in range(1, 101)]
    assert average_noise_scale(noisy, 100, 8) == pytest.approx(10.0, rel=1e-6)
    lost = [(step, Moments(-0.5, 20.0)) for step in range(1, 101)]
    assert average_noise_scale(lost, 100, 8) == math.inf
    assert math.isnan(average_noise_scale([], 100, 8))
    assert average_noise_scale([*clear, (101, Moments(1e9, 1.0))], 100, 8) == pytest.approx(10.0)


def test_looks_are_dense_first_and_then_a_share_of_the_steps() -> None:
    looks = [0]
    while looks[-1] < 3000:
        looks.append(next_look(looks[-1]))
    assert looks[: DENSE_STEPS + 1] == list(range(DENSE_STEPS + 1))
    assert len(looks) < 140
    assert all(
        later / earlier < 1.1 for earlier, later in zip(looks[DENSE_STEPS:], looks[DENSE_STEPS + 1 :], strict=False)
    )


def test_targets_are_found_within_a_percent_on_curved_and_noisy_curves() -> None:
    generator = np.random.default_rng(0)
    steps = [0, 1]
    while steps[-1] < 4000:
        steps.append(next_look(steps[-1]))
    for noise, tolerance in ((0.0, 0.005), (0.1, 0.05)):
        losses = [3 / (1 + (s / 150) ** 1.3) * math.exp(noise * generator.normal()) for s in steps]
        found = steps_to_targets(list(zip(steps, losses, strict=True)), (1.0, 0.2))
        expected = [150 * (3 / target - 1) ** (1 / 1.3) for target in (1.0, 0.2)]
        assert found == pytest.approx(expected, rel=tolerance)


def test_a_crossing_is_known_only_when_the_curve_goes_on() -> None:
    curve = [(step, 100.0 / step) for step in range(1, 61)]
    assert steps_to_targets(curve, (100.0 / 50,)) == pytest.approx((50.0,), rel=1e-3)
    assert math.isnan(steps_to_targets(curve[:52], (100.0 / 50,))[0])
    assert steps_to_targets([(0, 2.0), (1, 1.0)], (3.0,)) == (0.0,)
    assert smoothed(curve)[0][-1] <= math.log(60) - HALF_WIDTH
    assert loss_after(curve, 40) == pytest.approx(2.5, rel=2e-3)
    assert math.isnan(loss_after(curve, 60))
    with pytest.raises(ValueError, match="no logarithm"):
        steps_to_targets([(1, 0.0)], (0.5,))


def test_values_between_looks() -> None:
    assert value_at(math.sqrt(200), [(10, 1.0), (20, 2.0)]) == pytest.approx(1.5)
    assert value_at(30, [(10, 1.0), (20, 2.0)]) == 2.0
    assert math.isnan(value_at(math.nan, [(10, 1.0)])) and math.isnan(value_at(3, []))


def test_endings() -> None:
    load = workload(bowl(dimension=8), {"name": "sgd", "learning_rate": 1.0})
    assert run(load, 8, 3.0, 1e-6).stopped_because == "diverged"
    spent = run(load, 8, 1e-5, 1.0, steps=30)
    assert spent.stopped_because == "budget" and spent.steps == 30 and math.isnan(spent.steps_to_target[0])
    trial = Trial("sweep", 8, 1e-3, 0, (100.0, 1.0), 10_000, hopeless_steps=200.0)
    result = run_trial(load, trial)
    assert result.stopped_because == "hopeless" and 200 < result.steps < 215
    assert math.isfinite(result.steps_to_target[0]) and math.isnan(result.steps_to_target[1])


def test_a_batch_that_is_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="sweep.batch_sizes: 2048.*1472 examples"):
        workload({"name": "digits"}, {"name": "sgd"}, batch_sizes=[4, 8, 16, 32, 2048])


def test_what_a_trials_steps_do_not_have_is_refused() -> None:
    """They would train without it, and the critical batch size would be that of another training."""
    for optimizer, words in (
        ({"name": "sgd", "sam_rho": 0.05}, "leave out optimizer.sam_rho$"),
        (
            {"name": "momentum", "momentum": 0.5, "final_momentum": 0.9, "momentum_steps": 9},
            "leave out optimizer.final_momentum$",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            workload(bowl(), {**optimizer, "learning_rate": 0.1})


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    load = workload({"name": "digits", "batch_norm": False, "channels": 2}, {"name": "adam", "learning_rate": 0.02})
    first, again, other = (run(load, 16, 0.02, 1.8, seed=seed, steps=60) for seed in (0, 0, 1))
    assert first.curve == again.curve
    assert first.noise_preconditioned == again.noise_preconditioned
    assert first.curve != other.curve
    assert first.peak_memory_bytes > 50e6 and 0 < first.seconds_per_step < first.seconds
