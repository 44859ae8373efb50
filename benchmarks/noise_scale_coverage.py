"""How often the 95 % set of the noise scale holds the truth, over distributions, windows and batch sizes.

    python benchmarks/noise_scale_coverage.py [--repetitions 2000] [--quick] [--only TEXT] [--json FILE]

A cell is a kind of gradient, a number of observations n and a batch b against the noise scale B. Coverage is
unconditional: an unbounded set [low, inf) covers where low <= B, and "no bound" is the whole line and covers. Beside it:
how often the truth lay below and above the set, Fieller's set uncorrected for skewness, coverage given that the state is `resolved` (a selected part, not what
95 % is promised of), the delta method's (B +- t standard errors, for comparison), the median of high/low where both
are finite and above 0, and the share of each state in per cent.

Steps come from noise_scale_populations.py, through `Units.moments`, `ratio_interval` and `state_of`. Every window of a
simulation of 400 observations is used, up to four times `--repetitions` a cell. The |G|^2 of rows that say "falls"
drops by the factor within each window; the truth is then tr(Sigma) over the window's average of |G|^2.

After the cells: the adaptive window, read by `NoiseScaleWindow` itself after 400 observations, against the average of
the window that it chose, and whether choosing moved the averages; and the planner against simulated windows.
Runs for some three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ddp.noise.interval import PairedMeans, fieller, ratio_interval, t_quantile
from ddp.noise.noise_scale import LARGEST_WINDOW, NoiseScaleWindow, state_of
from noise_scale_populations import (
    FLAT,
    POWER_LAW,
    SHORT_POWER_LAW,
    SPIKE,
    Floats,
    Population,
    StepNoise,
    digits,
    finite,
    gaussian,
    heavy_tailed,
    joint_t5,
)

SIZES = (25, 100, 400)
BATCH_OVER_NOISE_SCALE = (1 / 30, 0.1, 0.3, 1.0, 3.0)
EVEN, THREE, FOUR = (16, 16), (16, 11, 5), (14, 9, 6, 3)  # examples of each unit
LOWEST, HIGHEST = 0.93, 0.97
CONFIDENCE = 0.95

Draw = Callable[[np.random.Generator, tuple[int, int]], StepNoise]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of gradient, and by which factor |G|^2 falls within a window."""

    name: str
    draw: Draw
    falls: float = 1.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What one cell showed; shares of its `repetitions` windows."""

    kind: str
    observations: int
    batch_over_noise_scale: float
    repetitions: int
    covered: float
    truth_below: float
    truth_above: float
    covered_by_fieller: float
    covered_if_resolved: float
    covered_by_delta_method: float
    median_high_over_low: float
    states: dict[str, float]

    @property
    def standard_error(self) -> float:
        """Of `covered`, were it 95 %."""
        return math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / self.repetitions)


@dataclass(frozen=True, slots=True)
class Windows:
    """Means over each window with their covariance from first differences, as `NoiseScaleWindow` takes them."""

    x: Floats
    y: Floats
    variance_x: Floats
    variance_y: Floats
    covariance: Floats

    @classmethod
    def of(cls, traces: Floats, norms: Floats) -> Windows:
        n = traces.shape[1]
        dx, dy, scale = np.diff(traces, axis=1), np.diff(norms, axis=1), 2.0 * n * (n - 1)
        products = [np.einsum("ij,ij->i", a, b) / scale for a, b in ((dx, dx), (dy, dy), (dx, dy))]
        return cls(traces.mean(axis=1), norms.mean(axis=1), *products)

    def __iter__(self) -> Iterator[PairedMeans]:
        columns = (self.x, self.y, self.variance_x, self.variance_y, self.covariance)
        return (PairedMeans(*row) for row in np.stack(columns, axis=1).tolist())

    def delta_method_covers(self, truth: float, t: float) -> float:
        """The share of windows whose ratio lies within t of its own standard errors of the truth."""
        ratio = self.x / self.y
        variance = self.variance_x - 2 * ratio * self.covariance + ratio**2 * self.variance_y
        return float((np.abs(ratio - truth) * np.abs(self.y) <= t * np.sqrt(variance)).mean())


def squared_norms(noise_scale: float, size: int, falls: float) -> Floats:
    """|G|^2 of each observation, for tr(Sigma) = 1: falls exponentially; its average makes the noise scale."""
    shape = falls ** (-np.arange(size) / size)
    return shape / (shape.mean() * noise_scale)


def cell(kind: Kind, noise: StepNoise, size: int, ratio: float, repetitions: int) -> Cell:
    """Windows of `size` observations at b/B = `ratio`."""
    truth, t = noise.batch / ratio, t_quantile(CONFIDENCE, 2 * (size - 1) / 3)
    traces, norms = noise.windows(size).moments(squared_norms(truth, size, kind.falls))
    kept = Windows.of(traces[:repetitions], norms[:repetitions])
    sets = [ratio_interval(means, t) for means in kept]
    plain = [fieller(means, t) for means in kept]
    states = [state_of(low, high, noise.examples) for low, high in sets]
    below, above = [truth < low for low, _ in sets], [truth > high for _, high in sets]
    resolved = [not (b or a) for b, a, state in zip(below, above, states, strict=True) if state == "resolved"]
    bounded = [high / low for low, high in sets if 0 < low <= high < math.inf]
    return Cell(
        kind=kind.name,
        observations=size,
        batch_over_noise_scale=ratio,
        repetitions=len(sets),
        covered=1.0 - float(np.mean(below)) - float(np.mean(above)),
        truth_below=float(np.mean(below)),
        truth_above=float(np.mean(above)),
        covered_by_fieller=1.0 - float(np.mean([truth < low or truth > high for low, high in plain])),
        covered_if_resolved=float(np.mean(resolved)) if len(resolved) >= 100 else math.nan,
        covered_by_delta_method=kept.delta_method_covers(truth, t),
        median_high_over_low=float(np.median(bounded)) if bounded else math.nan,
        states={state: count / len(sets) for state, count in Counter(states).items()},
    )


def kinds(early: Population, late: Population) -> list[Kind]:
    """All kinds of gradients; digits after one epoch and, nearly fitted, after eight."""
    return [
        Kind("Gaussian, 21 directions", lambda rng, shape: gaussian(rng, shape, FLAT, EVEN)),
        Kind("Gaussian, power law of 1e6", lambda rng, shape: gaussian(rng, shape, POWER_LAW, EVEN)),
        Kind("Gaussian, half in one", lambda rng, shape: gaussian(rng, shape, SPIKE, EVEN)),
        Kind("Gaussian, units 16 11 5", lambda rng, shape: gaussian(rng, shape, FLAT, THREE)),
        Kind("Gaussian, units 14 9 6 3", lambda rng, shape: gaussian(rng, shape, FLAT, FOUR)),
        Kind("Gaussian, falls 3x", lambda rng, shape: gaussian(rng, shape, FLAT, EVEN), 3.0),
        Kind("Gaussian, falls 10x", lambda rng, shape: gaussian(rng, shape, POWER_LAW, FOUR), 10.0),
        Kind("t5", lambda rng, shape: heavy_tailed(rng, shape, FLAT, EVEN, "t5")),
        Kind("t5, power law, 14 9 6 3", lambda rng, shape: heavy_tailed(rng, shape, SHORT_POWER_LAW, FOUR, "t5")),
        Kind("t5 jointly", lambda rng, shape: joint_t5(rng, shape, FLAT, EVEN)),
        Kind("lognormal 0.5", lambda rng, shape: heavy_tailed(rng, shape, FLAT, EVEN, "lognormal 0.5")),
        Kind("lognormal 0.5, 14 9 6 3", lambda rng, shape: heavy_tailed(rng, shape, FLAT, FOUR, "lognormal 0.5")),
        Kind("lognormal 1", lambda rng, shape: heavy_tailed(rng, shape, FLAT, EVEN, "lognormal 1")),
        Kind(
            "lognormal 1, power law", lambda rng, shape: heavy_tailed(rng, shape, SHORT_POWER_LAW, EVEN, "lognormal 1")
        ),
        Kind("lognormal 1, 14 9 6 3", lambda rng, shape: heavy_tailed(rng, shape, FLAT, FOUR, "lognormal 1")),
        Kind("digits early", lambda rng, shape: finite(rng, shape, early, EVEN, True)),
        Kind("digits early, no replacement", lambda rng, shape: finite(rng, shape, early, EVEN, False)),
        Kind("digits late", lambda rng, shape: finite(rng, shape, late, EVEN, True)),
        Kind("digits late, 16 11 5, falls 3x", lambda rng, shape: finite(rng, shape, late, THREE, True), 3.0),
        Kind("digits late, no replacement", lambda rng, shape: finite(rng, shape, late, EVEN, False)),
    ]


def describe(cells: Sequence[Cell]) -> Iterator[str]:
    """A line a cell."""
    yield (
        f"{'gradients':31s}{'n':>4s}{'b/B':>6s} {'covers':>7s} {'below':>5s} {'above':>5s} {'Fieller':>7s} "
        f"{'resolved':>8s} {'delta':>6s} {'hi/lo':>6s}  unresolved beyond_data lower_bound wide resolved"
    )
    for c in cells:
        shares = " ".join(f"{100 * c.states.get(s, 0.0):{len(s)}.0f}" for s in STATES)
        flag = " " if LOWEST <= c.covered <= HIGHEST else "*"
        yield (
            f"{c.kind:31s}{c.observations:4d}{c.batch_over_noise_scale:6.2f} {100 * c.covered:6.1f}{flag} "
            f"{100 * c.truth_below:5.1f} {100 * c.truth_above:5.1f} {100 * c.covered_by_fieller:7.1f} "
            f"{100 * c.covered_if_resolved:8.1f} "
            f"{100 * c.covered_by_delta_method:6.1f} {c.median_high_over_low:6.1f}  {shares}"
        )


STATES = ("unresolved", "beyond_data", "lower_bound", "wide", "resolved")


def summary(cells: Sequence[Cell]) -> Iterator[str]:
    """The worst cells, and all that lie outside 93 to 97 %."""
    ranked = sorted(cells, key=lambda c: c.covered)
    out = [c for c in ranked if not LOWEST <= c.covered <= HIGHEST]
    yield f"{len(cells) - len(out)} of {len(cells)} cells between {100 * LOWEST:.0f} and {100 * HIGHEST:.0f} %"
    delta = [c.covered_by_delta_method for c in cells]
    yield f"delta method: {100 * min(delta):.0f} to {100 * max(delta):.0f} %"
    for name, chosen in (("lowest", ranked[:3]), ("highest", ranked[-3:]), ("outside", out)):
        for c in chosen:
            where = f"{c.kind}, n = {c.observations}, b/B = {c.batch_over_noise_scale:.2f}"
            yield f"{name:8s} {100 * c.covered:.1f} +- {100 * c.standard_error:.1f} %: {where}"


def adaptive(kind: Kind, noise: StepNoise, ratio: float, repetitions: int) -> str:
    """The window that `NoiseScaleWindow` chooses among 400 observations; the shift says what choosing moved, in %."""
    truth = noise.batch / ratio
    true_norms = squared_norms(truth, LARGEST_WINDOW, kind.falls)
    traces, norms = noise.moments(true_norms)
    readings, targets = [], []
    for trace, norm in zip(traces[:repetitions].tolist(), norms[:repetitions].tolist(), strict=True):
        window = NoiseScaleWindow(None)
        window.load_state_dict({"observations": LARGEST_WINDOW, "variance_trace": trace, "squared_norm": norm})
        readings.append(window.reading)
        targets.append(float(true_norms[-window.reading.window :].mean()))
    covered = [not (r.low * norm > 1 or r.high * norm < 1) for r, norm in zip(readings, targets, strict=True)]
    resolved = [hit for r, hit in zip(readings, covered, strict=True) if r.state == "resolved"]
    shift_x = np.mean([r.variance_trace for r in readings]) - 1
    shift_y = np.mean([r.squared_norm / norm for r, norm in zip(readings, targets, strict=True)]) - 1
    sizes = Counter(r.window for r in readings)
    shares = " ".join(f"{100 * sizes[size] / len(readings):3.0f}" for size in (25, 50, 100, 200, 400))
    return (
        f"{kind.name:31s}{ratio:6.2f} {100 * np.mean(covered):7.1f} "
        f"{100 * np.mean(resolved) if len(resolved) >= 100 else math.nan:8.1f} {100 * shift_x:7.1f} {100 * shift_y:7.1f}"
        f"   {shares}  {100 * np.mean([r.drifting for r in readings]):5.0f}"
    )


def planner(rng: np.random.Generator, counts: tuple[int, ...], windows: int) -> str:
    """The v, and the steps to a finite upper end and to high/low <= 4, against windows of just these lengths."""
    noise_scale = 30 * sum(counts)
    norms = gaussian(rng, (2000, 400), FLAT, counts).moments(np.full(400, 1 / noise_scale))[1]
    v = float(norms.var() * noise_scale**2)
    text = f"{len(counts)} units: v = {v:5.1f}"
    for name, factor in (("a finite high end", 3.84), ("high/low <= 4", 10.7)):
        size = math.ceil(factor * v)
        made = gaussian(rng, (windows, size), FLAT, counts).moments(np.full(size, 1 / noise_scale))
        t = t_quantile(CONFIDENCE, 2 * (size - 1) / 3)
        sets = [ratio_interval(means, t) for means in Windows.of(*made)]
        reached = [high < math.inf if factor < 4 else high <= 4 * low for low, high in sets]
        text += f"; {name}: {size} steps, reached in {100 * np.mean(reached):.0f} % of windows of that length"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="windows a cell, at least")
    parser.add_argument("--quick", action="store_true", help="200 repetitions: to see that it runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds of gradients whose name holds it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the cells there too")
    arguments = parser.parse_args()
    repetitions = 200 if arguments.quick else arguments.repetitions
    cells, windows = [], []
    for number, kind in enumerate(kinds(digits(1), digits(8))):
        if arguments.only not in kind.name:
            continue
        noise = kind.draw(np.random.default_rng([arguments.seed, number]), (repetitions, LARGEST_WINDOW))
        fresh = [cell(kind, noise, size, ratio, 4 * repetitions) for size in SIZES for ratio in BATCH_OVER_NOISE_SCALE]
        print("\n".join(list(describe(fresh))[bool(cells) :]), flush=True)
        cells += fresh
        windows += [adaptive(kind, noise, ratio, repetitions) for ratio in (0.1, 0.3, 1.0)]
    print(
        "\nadaptive window after 400 observations (shifts in %, share of windows of 25 50 100 200 400, drift flag in %)"
    )
    print(
        f"{'gradients':31s}{'b/B':>6s} {'covers':>7s} {'resolved':>8s} {'shift S':>7s} {'|G|^2':>7s}"
        "    25  50 100 200 400  drift"
    )
    print("\n".join(windows))
    print("\nplanner at B/b = 30, (tr Sigma)^2 / tr Sigma^2 = 21")
    for counts in (EVEN, (8, 8, 8, 8)):
        print(planner(np.random.default_rng(arguments.seed), counts, max(repetitions // 4, 50)))
    print("\n" + "\n".join(summary(cells)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
