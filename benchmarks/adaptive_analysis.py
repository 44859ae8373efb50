"""What recorded runs say of batch sizes: time to a loss, what a step costs, what a moving batch can save, elsewhere too.

Noise-free steps s measure progress: a step at b examples is worth 1/(1 + B/b) of one (McCandlish et al. 2018,
arXiv:1812.06162, equation 2.7). Along a run's way B(s), with T(b) the seconds a step takes, a batch b(s) takes the
time of int T(b) (1 + B/b) ds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW = 25  # observations a decision takes
SMALLEST_CHANGE, LARGEST_CHANGE = 1.5, 2.0


@dataclass(frozen=True)
class Run:
    """One recorded run, an entry a step; noise scales are NaN where none is known."""

    examples: Floats
    seconds: Floats
    loss: Floats
    noise_scale: Floats

    def smoothed_loss(self, examples: float) -> Floats:
        """Mean loss of the newest steps that hold at least so many examples together; NaN while there are fewer."""
        count = np.concatenate([[0.0], np.cumsum(self.examples)])
        total = np.concatenate([[0.0], np.cumsum(self.loss * self.examples)])
        first = np.searchsorted(count, count[1:] - examples, side="right") - 1
        mean = (total[1:] - total[first]) / (count[1:] - count[first])
        return np.where(count[1:] >= examples, mean, math.nan)

    def steps_to(self, target: float, smoothing: float) -> int | None:
        """Steps until the smoothed loss is first at `target` or below."""
        reached = np.flatnonzero(self.smoothed_loss(smoothing) <= target)
        return int(reached[0]) + 1 if reached.size else None

    def seconds_to(self, target: float, smoothing: float) -> float:
        """Infinite where it does not come there."""
        steps = self.steps_to(target, smoothing)
        return math.inf if steps is None else float(self.seconds[:steps].sum())


@dataclass(frozen=True)
class Way:
    """The noise scale B along the noise-free steps of a run: pieces of the lengths `ds`."""

    noise_scale: Floats
    ds: Floats

    @property
    def mean(self) -> float:
        """int B ds / int ds."""
        return float(self.noise_scale @ self.ds / self.ds.sum())

    @property
    def gamma(self) -> float:
        """(int sqrt(B) ds)^2 / (int B ds int ds): 1 where B stays as it is."""
        return float((np.sqrt(self.noise_scale) @ self.ds) ** 2 / (self.noise_scale @ self.ds * self.ds.sum()))

    @property
    def bound(self) -> float:
        """The largest share of the best fixed batch's time that any moving one can save: (1 - sqrt(gamma))/2."""
        return (1 - math.sqrt(self.gamma)) / 2


def way_of(run: Run, steps: int) -> Way:
    """The way of a run's first steps. Until a noise scale is known the first one that is stands in for it."""
    known = np.flatnonzero(np.isfinite(run.noise_scale[:steps]) & (run.noise_scale[:steps] > 0))
    if not known.size:
        raise ValueError("the run has no noise scale")
    last = np.maximum(np.searchsorted(known, np.arange(steps), side="right") - 1, 0)
    noise_scale = run.noise_scale[known[last]]
    return Way(noise_scale, 1.0 / (1.0 + noise_scale / run.examples[:steps]))


def affine_cost(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a and c of T = a + c b through (b, seconds), by least squares of relative errors.

    Where noise would have one of them below a hundredth of the largest batch's time, it is that.
    """
    sizes, seconds = np.array(points).T
    design = np.stack([1 / seconds, sizes / seconds], axis=1)
    (a, c), *_ = np.linalg.lstsq(design, np.ones(len(points)), rcond=None)
    least = 0.01 * float(seconds[sizes.argmax()])
    return max(float(a), least), max(float(c), least / float(sizes.max()))


def collective_seconds(ranks: int, bytes_: float, alpha: float, beta: float) -> float:
    """An all-reduce by halving and doubling: 2 log2(R) alpha + 2 (R - 1)/R n beta (Thakur et al. 2005)."""
    return 2 * math.log2(ranks) * alpha + 2 * (ranks - 1) / ranks * bytes_ * beta if ranks > 1 else 0.0


@dataclass(frozen=True)
class Machine:
    """Where a step costs a + c b seconds; a batch has at least `smallest` examples, one a rank."""

    a: float
    c: float
    smallest: float = 1.0

    def fixed(self, way: Way, batch: float) -> float:
        """Seconds along the way at one batch size."""
        return float((self.a + self.c * batch) * ((1 + way.noise_scale / batch) @ way.ds))

    def best_fixed(self, way: Way) -> tuple[float, float]:
        """The best one batch size, sqrt(mean B a/c), and its seconds."""
        batch = max(math.sqrt(way.mean * self.a / self.c), self.smallest)
        return batch, self.fixed(way, batch)

    def free(self, way: Way) -> float:
        """Seconds of a batch that is sqrt(B a/c) at every moment."""
        batch = np.maximum(np.sqrt(way.noise_scale * self.a / self.c), self.smallest)
        return float((self.a + self.c * batch) @ ((1 + way.noise_scale / batch) * way.ds))

    def followed(self, way: Way, start: float) -> float:
        """Seconds of a batch that follows as the trainer's does: a doubling at most, after 25 steps, from 1.5x on."""
        batch, since, seconds = max(start, self.smallest), 0.0, 0.0
        for noise_scale, ds in zip(way.noise_scale.tolist(), way.ds.tolist(), strict=True):
            steps = ds * (1 + noise_scale / batch)
            seconds, since = seconds + steps * (self.a + self.c * batch), since + steps
            best = max(math.sqrt(noise_scale * self.a / self.c), self.smallest)
            if since >= WINDOW and max(best / batch, batch / best) >= SMALLEST_CHANGE:
                batch = min(max(best, batch / LARGEST_CHANGE), batch * LARGEST_CHANGE)
                since = 0.0
        return seconds


def neighbours(sizes: Sequence[int], best: int, factor: int = 4) -> list[int]:
    """Of the fixed sizes those that are `factor` away from the best one."""
    return [size for size in sizes if size in (best * factor, best // factor)]
