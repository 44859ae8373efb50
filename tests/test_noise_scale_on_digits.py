"""Real gradients at fixed weights: what shards of the digits say, against every example's own gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddp.job import DigitsSection
from ddp.noise.moments import unbiased_moments
from ddp.tasks.digits import DigitsTask

STEPS = 250


@dataclass(frozen=True)
class FixedWeights:
    """A partly trained network in evaluation mode, its training set, and the truth about the two."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    squared_norm: float  # |G|^2
    deviations: float  # sum over examples of |g - G|^2


@pytest.fixture(scope="module")
def fixed() -> FixedWeights:
    torch.manual_seed(3)
    task = DigitsTask(DigitsSection(name="digits", channels=6))
    model = task.model().double()
    images, labels = task.datasets()[0].tensors
    images = images.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for rows in torch.randperm(len(images)).split(64) * 3:
        optimizer.zero_grad()
        cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval()
    gradients = _per_example_gradients(model, images, labels)
    mean = gradients.mean(dim=0)
    deviations = (gradients - mean).square().sum()
    return FixedWeights(model, images, labels, float(mean.square().sum()), float(deviations))


def _per_example_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Shape (examples, parameters)."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (image.unsqueeze(0),))
        return cross_entropy(logits, label.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def _shard_gradient(fixed: FixedWeights, rows: NDArray[np.int64]) -> Tensor:
    """One rank's backward: the gradient of the mean loss over its examples, flat."""
    fixed.model.zero_grad()
    chosen = torch.from_numpy(rows)
    cross_entropy(fixed.model(fixed.images[chosen]), fixed.labels[chosen]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in fixed.model.parameters() if parameter.grad is not None])


def _norms(
    fixed: FixedWeights, counts: tuple[int, ...], draw: Callable[[int], NDArray[np.int64]]
) -> Iterator[tuple[list[float], float]]:
    """Each step's squared norms, of the shards' gradients and of their mean over examples."""
    for _ in range(STEPS):
        shards = np.split(draw(sum(counts)), np.cumsum(counts)[:-1])
        own = torch.stack([_shard_gradient(fixed, shard) for shard in shards])
        mean = (own * torch.tensor(counts, dtype=own.dtype)[:, None]).sum(dim=0) / sum(counts)
        yield own.square().sum(dim=1).tolist(), float(mean.square().sum())


def _pairs(
    norms: Iterable[tuple[list[float], float]], counts: tuple[int, ...], population: float
) -> NDArray[np.float64]:
    """tr(Sigma) and |G|^2 of each step, shape (steps, 2)."""
    steps = [unbiased_moments(own, counts, mean, population=population) for own, mean in norms]
    return np.array([(moments.variance_trace, moments.squared_norm) for moments in steps if moments is not None])


def _standard_errors_off(series: NDArray[np.float64], truth: float) -> float:
    return float((series.mean() - truth) / (series.std(ddof=1) / math.sqrt(len(series))))


@pytest.mark.parametrize("counts", [(32, 32), (48, 5, 11)])
@pytest.mark.parametrize("replacement", [True, False])
def test_within_three_standard_errors(fixed: FixedWeights, counts: tuple[int, ...], replacement: bool) -> None:
    examples, rng = len(fixed.images), np.random.default_rng([len(counts), replacement])
    norms = _norms(fixed, counts, lambda n: rng.choice(examples, n, replace=replacement))
    pairs = _pairs(norms, counts, math.inf if replacement else examples)
    assert len(pairs) == STEPS
    trace = fixed.deviations / (examples if replacement else examples - 1)
    noise_scale = trace / fixed.squared_norm
    assert abs(_standard_errors_off(pairs[:, 0], trace)) < 3
    assert abs(_standard_errors_off(pairs[:, 1], fixed.squared_norm)) < 3
    assert abs(_standard_errors_off(pairs[:, 0] - noise_scale * pairs[:, 1], 0.0)) < 3


def test_large_batches_without_replacement_need_the_population(fixed: FixedWeights) -> None:
    examples, rng, counts = len(fixed.images), np.random.default_rng(1), (120, 200)
    norms = list(_norms(fixed, counts, lambda n: rng.permutation(examples)[:n]))
    known, ignored = (_pairs(norms, counts, population)[:, 1] for population in (examples, math.inf))
    assert abs(_standard_errors_off(known, fixed.squared_norm)) < 3
    assert _standard_errors_off(ignored, fixed.squared_norm) < -3


def test_the_enumerated_gradients_are_those_of_backward(fixed: FixedWeights) -> None:
    whole = _shard_gradient(fixed, np.arange(len(fixed.images)))
    assert float(whole.square().sum()) == pytest.approx(fixed.squared_norm, rel=1e-9)
