"""Training steps whose gradient noise scale is known, drawn without drawing gradients of many dimensions.

A step's squared norms depend on its gradients through three numbers only. With unit gradients g_u = G + e_u,
weights v_u and the mean ebar of the e_u,

    sum v_u |g_u|^2 = sum v_u |e_u|^2 + sum v_u (2 |G| h + |G|^2)      h = ebar along G
    |gbar|^2        = |ebar|^2 + 2 |G| h + |G|^2

so the noise (`StepNoise`) is drawn once and serves every |G|^2, also one that moves from step to step, and windows of
every length. How the noise is drawn:

    Gaussian      exactly, from chi-squares. With weights b_u the spread sum b_u |e_u - ebar|^2 is independent of ebar; a
                  block of m equal eigenvalues l gives it l chi2[m (units - 1)] and |ebar|^2 the l/b chi2[m], so that
                  a million dimensions in twenty blocks cost as much as sixty.
    t5, lognormal independent in each coordinate. A unit's mean over its examples is drawn from 2^19 such means, made once
                  and shifted and scaled to mean 0 and variance 1/examples: the truth is exact, tails end there.
    joint t5      examples that are large in all coordinates at once; given the examples' scales a unit is Gaussian.
    digits        enumerated gradients of the training set at fixed weights, on the 48 directions that hold most of
                  their trace: a finite population, whose truth is a sum over it. Rows are drawn with replacement,
                  or as slices of one permutation an epoch.

All traces are 1 (of one example; over N - 1 where a finite population is drawn without replacement).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddp.noise.moments import Moments, Units
from ddp.noise.noise_scale import LARGEST_WINDOW

Floats = NDArray[np.float64]
Tail = Literal["t5", "lognormal 0.5", "lognormal 1"]
CHUNK = 20 * LARGEST_WINDOW  # steps drawn at once: some tens of MB
POOL = 1 << 19
DIRECTIONS = 48


@dataclass(frozen=True, slots=True)
class StepNoise:
    """The noise of many steps, each array of shape (windows, observations), for tr(Sigma) = 1."""

    weighted_squared_norms: Floats  # sum v_u |e_u|^2, v_u the unit's examples
    mean_squared_norm: Floats  # |ebar|^2
    along: Floats  # h
    counts: tuple[int, ...]  # examples of each unit
    examples: float = math.inf  # N, the finite population drawn from without replacement

    @property
    def batch(self) -> int:
        """Examples a step."""
        return sum(self.counts)

    def windows(self, size: int) -> StepNoise:
        """The same steps as windows of `size`, which divides the present one's; neighbours stay together."""
        own, mean, along = self.weighted_squared_norms, self.mean_squared_norm, self.along
        shape = (-1, size)
        return StepNoise(own.reshape(shape), mean.reshape(shape), along.reshape(shape), self.counts, self.examples)

    def moments(self, squared_norms: Floats) -> tuple[Floats, Floats]:
        """S and |G|^2 of every step, each shaped as the noise, where |G|^2 is `squared_norms`, one an observation.

        Both are linear in the step's two sums, so that `Units.moments` is asked for its coefficients only.
        """
        shift = 2.0 * np.sqrt(squared_norms) * self.along + squared_norms
        own, mean = self.weighted_squared_norms + self.batch * shift, self.mean_squared_norm + shift
        of_own, of_mean = self._coefficients(1.0, 0.0), self._coefficients(0.0, 1.0)
        return (
            of_own.variance_trace * own + of_mean.variance_trace * mean,
            of_own.squared_norm * own + of_mean.squared_norm * mean,
        )

    def _coefficients(self, own: float, mean: float) -> Moments:
        units = sum((Units.one(count) for count in self.counts), Units())
        moments = units.moments(own, mean, self.examples)
        if moments is None:
            raise ValueError(f"no moments from units of {self.counts}")
        return moments


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of Sigma with sum 1, each with its multiplicity."""

    eigenvalues: Floats
    multiplicities: NDArray[np.int64]

    @classmethod
    def of(cls, eigenvalues: Sequence[float], multiplicities: Sequence[int]) -> Spectrum:
        """Scaled to trace 1."""
        values, times = np.array(eigenvalues, dtype=np.float64), np.array(multiplicities)
        return cls(values / (values * times).sum(), times)

    @property
    def effective_dimensions(self) -> float:
        """(tr Sigma)^2 / tr Sigma^2."""
        return float(1.0 / (self.eigenvalues**2 * self.multiplicities).sum())

    @property
    def blocks(self) -> Floats:
        """Each block's part of the trace; G lies so that its squared parts are these."""
        return self.eigenvalues * self.multiplicities

    def coordinates(self) -> Floats:
        """All eigenvalues, one a dimension."""
        return np.repeat(self.eigenvalues, self.multiplicities)


FLAT = Spectrum.of([1.0], [21])  # 21 as measured on digits
POWER_LAW = Spectrum.of([2.0 ** (-1.25 * j) for j in range(20)], [1 << j for j in range(20)])  # a million dimensions
SHORT_POWER_LAW = Spectrum.of([1 / k for k in range(1, 61)], [1] * 60)
SPIKE = Spectrum.of([0.5, 0.005], [1, 100])  # half of the noise in one direction


def gaussian(
    rng: np.random.Generator, shape: tuple[int, int], spectrum: Spectrum, counts: tuple[int, ...]
) -> StepNoise:
    """Normal gradients, exactly distributed (see above)."""
    batch, units = sum(counts), len(counts)
    own, mean, along = _empty(shape)
    values, times = spectrum.eigenvalues, spectrum.multiplicities
    for part in _parts(own.size):
        size = (part.stop - part.start, len(values))
        first = rng.standard_normal(size)
        others = np.where(times > 1, rng.chisquare(np.maximum(times - 1, 1), size), 0.0)
        mean[part] = (first**2 + others) @ values / batch
        along[part] = first @ np.sqrt(values * spectrum.blocks / batch)
        own[part] = rng.chisquare(times * (units - 1), size) @ values + batch * mean[part]
    return _noise(shape, own, mean, along, counts)


def heavy_tailed(
    rng: np.random.Generator, shape: tuple[int, int], spectrum: Spectrum, counts: tuple[int, ...], tail: Tail
) -> StepNoise:
    """Independent coordinates of one distribution, G in the direction in which all of them are skewed."""
    pools = {count: _means_of(rng, tail, count) for count in set(counts)}
    scale = np.sqrt(spectrum.coordinates())
    own, mean, along = _empty(shape)
    for part in _parts(own.size):
        size = (part.stop - part.start, len(scale))
        units = [scale * pools[count][rng.integers(0, POOL, size)] for count in counts]
        own[part], mean[part], along[part] = _norms(units, counts, scale)
    return _noise(shape, own, mean, along, counts)


def joint_t5(
    rng: np.random.Generator, shape: tuple[int, int], spectrum: Spectrum, counts: tuple[int, ...]
) -> StepNoise:
    """A multivariate t with 5 degrees of freedom: one scale an example, for all coordinates."""
    scale = np.sqrt(spectrum.coordinates())
    own, mean, along = _empty(shape)
    for part in _parts(own.size):
        steps = part.stop - part.start
        units = []
        for count in counts:
            variances = (3.0 / rng.chisquare(5, (steps, count))).sum(axis=1) / count**2
            units.append(scale * rng.standard_normal((steps, len(scale))) * np.sqrt(variances)[:, None])
        own[part], mean[part], along[part] = _norms(units, counts, scale)
    return _noise(shape, own, mean, along, counts)


@dataclass(frozen=True, slots=True)
class Population:
    """Per-example gradients less their mean, shape (N, directions), and the unit direction of G in the same."""

    deviations: Floats
    direction: Floats


def finite(
    rng: np.random.Generator,
    shape: tuple[int, int],
    population: Population,
    counts: tuple[int, ...],
    replacement: bool,
) -> StepNoise:
    """Rows of an enumerated population."""
    total = len(population.deviations)
    trace = float(np.square(population.deviations).sum()) / (total if replacement else total - 1)
    rows = (population.deviations / math.sqrt(trace)).astype(np.float32)
    starts, counted = np.cumsum((0, *counts[:-1])), np.array(counts, dtype=np.float32)[:, None]
    own, mean, along = _empty(shape)
    for part in _parts(own.size):
        chosen = _rows(rng, part.stop - part.start, total, sum(counts), replacement)
        units = np.add.reduceat(rows[chosen], starts, axis=1).astype(np.float64) / counted
        own[part], mean[part], along[part] = _norms(list(units.swapaxes(0, 1)), counts, population.direction)
    return _noise(shape, own, mean, along, counts, math.inf if replacement else total)


def digits(epochs: int) -> Population:
    """A small convolutional network after some epochs of Adam on the digits, normalisation in evaluation mode."""
    import torch

    from ddp.job import DigitsSection
    from ddp.tasks.digits import DigitsTask

    torch.manual_seed(3)
    task = DigitsTask(DigitsSection(name="digits", channels=6))
    model = task.model().double()
    images, labels = task.datasets()[0].tensors
    images = images.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, values, (image.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(logits, label.unsqueeze(0))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return _principal(torch.cat([gradient.flatten(1) for gradient in each.values()], dim=1).numpy())


def _principal(gradients: Floats) -> Population:
    mean = gradients.mean(axis=0)
    deviations = gradients - mean
    variances, left = np.linalg.eigh(deviations @ deviations.T)
    variances, left = variances[-DIRECTIONS:], left[:, -DIRECTIONS:]
    direction = (left.T @ (deviations @ mean)) / np.sqrt(variances)
    kept = left * np.sqrt(variances)
    return Population(kept - kept.mean(axis=0), direction / np.linalg.norm(direction))


def _rows(rng: np.random.Generator, steps: int, total: int, batch: int, replacement: bool) -> NDArray[np.int64]:
    """Each step's examples, shape (steps, batch); without replacement the epochs begin at any point of the first."""
    if replacement:
        return rng.integers(0, total, (steps, batch))
    steps_per_epoch = total // batch
    epochs = -(-steps // steps_per_epoch) + 1
    orders = rng.permuted(np.tile(np.arange(total), (epochs, 1)), axis=1)[:, : steps_per_epoch * batch]
    first = rng.integers(0, steps_per_epoch)
    return orders.reshape(-1, batch)[first : first + steps]


def _means_of(rng: np.random.Generator, tail: Tail, count: int) -> Floats:
    """Means of `count` draws, mean 0 and variance 1/count exactly."""
    total = np.zeros(POOL)
    for _ in range(count):
        if tail == "t5":
            total += rng.standard_t(5, POOL)
        else:
            total += np.exp((1.0 if tail == "lognormal 1" else 0.5) * rng.standard_normal(POOL))
    total -= total.mean()
    return total / (total.std() * math.sqrt(count))


def _norms(units: Sequence[Floats], counts: tuple[int, ...], direction: Floats) -> tuple[Floats, Floats, Floats]:
    """sum v_u |e_u|^2, |ebar|^2 and h of each step from its units' own mean gradients."""
    own = sum(count * np.square(unit).sum(axis=1) for count, unit in zip(counts, units, strict=True))
    mean = sum(count * unit for count, unit in zip(counts, units, strict=True)) / sum(counts)
    return np.asarray(own), np.square(mean).sum(axis=1), mean @ direction


def _empty(shape: tuple[int, int]) -> tuple[Floats, Floats, Floats]:
    steps = shape[0] * shape[1]
    return np.empty(steps), np.empty(steps), np.empty(steps)


def _parts(steps: int) -> Iterator[slice]:
    """CHUNK is a multiple of the longest window, so that no window spans two epochs of different draws."""
    for start in range(0, steps, CHUNK):
        yield slice(start, min(start + CHUNK, steps))


def _noise(
    shape: tuple[int, int], own: Floats, mean: Floats, along: Floats, counts: tuple[int, ...], total: float = math.inf
) -> StepNoise:
    return StepNoise(own.reshape(shape), mean.reshape(shape), along.reshape(shape), counts, total)
