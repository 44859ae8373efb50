"""What a learning-rate range test says: a curve of losses over rates, smoothed, and the rates at its features.

Numbers in, numbers out. A curve has one loss more than rates: `losses[i + 1]` is the first that shows what the update at
`rates[i]` did, `losses[0]` was there before any.

Where the loss is steepest, or half-way down, depends on the test: the more steps there are to a factor of rate, the
sooner small rates have done the work. With N steps to a factor of e, gradient descent on a quadratic of curvature h has
the loss fall as exp(-2 h N rate): it is half-way down at log(2) / (2 h N), while the best constant rate is 1 / h. Where it
comes up again lies above 2 / h, from which on rates diverge, since they need steps to show it. The best rate thus lies
between the two sides of the valley, and what is recommended is the middle between them, by factors. A finer test sees
the first side earlier, by as much as it is finer: it is counted as one of `REFERENCE` steps to a factor of e would see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

End = Literal["range", "blown up", "not finite"]
Kind = Literal["found", "open", "flat", "rises at once", "not finite"]

BASELINE_SHARE = 0.1  # of the steps, whose losses are taken for those of the untouched model
LEAST_BASELINE = 5
SMOOTHING = 0.06  # of a test: how far back losses still count, by 1 / e
LIVE_SMOOTHING = 0.7  # while the test goes on: what is late blows up further
NOISE_OF_A_BLOW_UP = 6.0  # standard deviations of single losses
NOISE_OF_A_DESCENT = 15.0  # the same over sqrt(steps), as what is averaged is a share of the steps, but at least
LEAST_NOISE_OF_A_DESCENT = 1.2  # this: of 500 tests of 40, 100 and 300 steps of noise alone 2, 3 and 3 % see a descent
STARTED = 0.1  # of the descent
REFERENCE = 10.0  # steps to a factor of e


@dataclass(frozen=True, slots=True)
class Curve:
    """One pass over rising rates.

    Attributes:
        rates: (n,), rising, those whose effect was seen.
        losses: (n + 1,), finite.
        end: why it went no further.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    end: End


@dataclass(frozen=True, slots=True)
class Baseline:
    """The loss before the rates do anything: its median, and the standard deviation of single steps' losses."""

    loss: float
    noise: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> Baseline:
        """From some losses of the untouched model; robust: medians, of differences of neighbours over 0.6745 sqrt(2)."""
        return cls(float(np.median(losses)), noise_of(losses))

    def ceiling(self, lowest: float) -> float:
        """The smoothed loss from which on a curve that had come down to `lowest` has blown up."""
        return self.loss + max(self.loss - lowest, 0.5 * abs(self.loss), NOISE_OF_A_BLOW_UP * self.noise)


def noise_of(losses: Sequence[float]) -> float:
    """The standard deviation of single losses, if what they are about changes little from one to the next."""
    if len(losses) < 2:
        return 0.0
    return float(np.median(np.abs(np.diff(losses)))) / (0.6745 * math.sqrt(2))


def baseline_steps(steps: int) -> int:
    return max(LEAST_BASELINE, round(BASELINE_SHARE * steps))


@dataclass
class BlowUpWatch:
    """Told each loss of a test of so many `steps`, says when it has blown up: a running mean, corrected for its start.

    `baseline` where it is known from an earlier pass.
    """

    steps: int
    baseline: Baseline | None = None
    _losses: list[float] = field(default_factory=list)
    _sum: float = 0.0
    _weight: float = 0.0
    _lowest: float = math.inf

    def observe(self, loss: float) -> bool:
        """Whether the test is to stop after this loss, a finite one."""
        self._losses.append(loss)
        self._sum = LIVE_SMOOTHING * self._sum + (1 - LIVE_SMOOTHING) * loss
        self._weight = LIVE_SMOOTHING * self._weight + (1 - LIVE_SMOOTHING)
        if self.baseline is None and len(self._losses) >= baseline_steps(self.steps):
            self.baseline = Baseline.of(self._losses)
        if self.baseline is None:
            return False
        smoothed = self._sum / self._weight
        self._lowest = min(self._lowest, smoothed)
        return smoothed > self.baseline.ceiling(self._lowest)


def exponential_rates(low: float, high: float, steps: int) -> tuple[float, ...]:
    """`steps` rates from `low` to `high`, by equal factors."""
    return tuple(float(rate) for rate in np.geomspace(low, high, steps))


def smoothed(losses: Sequence[float], steps: int) -> NDArray[np.float64]:
    """The mean of two exponential moving averages, one forwards and one backwards, so that nothing is late; (n,).

    Each is corrected for its start (Kingma and Ba 2015, section 3: divided by 1 - beta^t). Over how many decades it
    averages does not depend on the `steps` of the test, so that more of them leave less noise: beta is 0.85 for 100.
    """
    values, beta = np.asarray(losses, dtype=float), math.exp(-1 / (SMOOTHING * steps))
    return (_running(values, beta) + _running(values[::-1], beta)[::-1]) / 2


def _running(values: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    result, mean = np.empty_like(values), 0.0
    for index, value in enumerate(values):
        mean = beta * mean + (1 - beta) * value
        result[index] = mean / (1 - beta ** (index + 1))
    return result


@dataclass(frozen=True, slots=True)
class Features:
    """Rates at which a curve does something; NaN where it does not.

    Attributes:
        kind: "found"; "open": it came down and did not come up again within the range; "flat": it did not come down;
            "rises at once": nor that, and it blew up within its first steps; "not finite": nor that, and it was no number
            all of a sudden, or already before any update.
        start: where a tenth of the descent is done.
        steepest: where the smoothed loss falls fastest over the logarithm of the rate.
        half_way: where half of the descent is done.
        minimum: of the smoothed loss.
        half_way_up: where half of the descent is lost again.
        blow_up: the last rate, where the test ended because the loss had blown up or was no longer finite.
        smoothed: (n,) the smoothed losses, one a rate; what is above the ceiling cut off.
        baseline: what the descent is counted from; None where there was no loss.
    """

    kind: Kind
    start: float = math.nan
    steepest: float = math.nan
    half_way: float = math.nan
    minimum: float = math.nan
    half_way_up: float = math.nan
    blow_up: float = math.nan
    smoothed: tuple[float, ...] = ()
    baseline: Baseline | None = None


def features(curve: Curve, steps: int, baseline: Baseline | None = None) -> Features:
    """Of a pass that was meant to have so many `steps`; `baseline` where it is known from an earlier one."""
    if not curve.losses:
        return Features("not finite")
    blow_up = curve.rates[-1] if curve.end != "range" and curve.rates else math.nan
    fixed, plateau = baseline, baseline_steps(steps)
    baseline = fixed or Baseline.of(curve.losses[:plateau])
    if len(curve.rates) < LEAST_BASELINE:
        return Features(_without_descent(curve, baseline, steps), blow_up=blow_up, baseline=baseline)
    descent = _descent(curve, steps, baseline)
    while fixed is None and descent.start + 1 > 1.2 * plateau:  # more of the losses are of the untouched model
        plateau = int(descent.start) + 1
        baseline = Baseline.of(curve.losses[:plateau])
        descent = _descent(curve, steps, baseline)
    line = tuple(float(value) for value in descent.line)
    noise = max(baseline.noise, noise_of(curve.losses[: max(descent.lowest + 2, plateau)]))
    if not descent.depth > max(noise * _least_depth(steps), 1e-6 * abs(baseline.loss)):
        kind = _without_descent(curve, baseline, steps)
        return Features(kind, blow_up=blow_up, smoothed=line, baseline=baseline)
    return _valley(curve, baseline, descent, blow_up)


def _least_depth(steps: int) -> float:
    """Of a descent, in standard deviations of single losses."""
    return max(NOISE_OF_A_DESCENT / math.sqrt(steps), LEAST_NOISE_OF_A_DESCENT)


def _without_descent(curve: Curve, baseline: Baseline, steps: int) -> Kind:
    if curve.end == "not finite" and curve.losses[-1] <= baseline.ceiling(min(curve.losses)):
        return "not finite"
    at_once = curve.end != "range" and len(curve.rates) < 2 * baseline_steps(steps)
    return "rises at once" if at_once else "flat"


@dataclass(frozen=True, slots=True)
class _Descent:
    """`lowest` is an index of the smoothed `line`, `start` a place between two of them."""

    line: NDArray[np.float64]
    lowest: int
    depth: float
    start: float


def _descent(curve: Curve, steps: int, baseline: Baseline) -> _Descent:
    cut = np.minimum(curve.losses, baseline.ceiling(min(curve.losses)))
    line = smoothed(cut.tolist(), steps)[1:]
    lowest = int(line.argmin())
    depth = baseline.loss - float(line[lowest])
    return _Descent(line, lowest, depth, _down_through(line, lowest, baseline.loss - STARTED * depth))


def _valley(curve: Curve, baseline: Baseline, descent: _Descent, blow_up: float) -> Features:
    line, lowest, middle = descent.line, descent.lowest, baseline.loss - 0.5 * descent.depth
    slope = np.gradient(line, np.log(curve.rates))
    first = min(int(descent.start), lowest)
    up = _up_through(line, lowest, middle)
    half_way_up = blow_up if up is None else _rate_at(curve.rates, up)
    return Features(
        kind="found" if math.isfinite(half_way_up) else "open",
        start=_rate_at(curve.rates, descent.start),
        steepest=curve.rates[first + int(slope[first : lowest + 1].argmin())],
        half_way=_rate_at(curve.rates, _down_through(line, lowest, middle)),
        minimum=curve.rates[lowest],
        half_way_up=half_way_up,
        blow_up=blow_up,
        smoothed=tuple(float(value) for value in line),
        baseline=baseline,
    )


def _down_through(line: NDArray[np.float64], lowest: int, level: float) -> float:
    """The place, in parts of a step, where the line falls through `level` for the last time before its lowest point."""
    above = np.flatnonzero(line[:lowest] >= level)
    return _crossing(line, int(above[-1]), level) if len(above) else 0.0


def _up_through(line: NDArray[np.float64], lowest: int, level: float) -> float | None:
    """The place where it rises through `level` for the first time after that; None where it does not."""
    above = np.flatnonzero(line[lowest:] >= level)
    return _crossing(line, lowest + int(above[0]) - 1, level) if len(above) else None


def _crossing(line: NDArray[np.float64], index: int, level: float) -> float:
    return index + float((level - line[index]) / (line[index + 1] - line[index]))


def _rate_at(rates: Sequence[float], place: float) -> float:
    """Between two rates by their logarithms."""
    return float(np.exp(np.interp(place, np.arange(len(rates)), np.log(rates))))


def zoomed_range(found: Features, last: float, low: float, highest: float) -> tuple[float, float]:
    """Where a second pass looks closer: from a tenth of the rate half-way down to twice the blow-up.

    `last` is the last rate of the first pass, `low` its first; nothing goes below that or above `highest`.
    """
    top = min(2 * found.blow_up, highest) if math.isfinite(found.blow_up) else last
    return max(found.half_way / 10, low), top


def continued_rates(rates: Sequence[float], highest: float) -> tuple[float, ...]:
    """`rates` and more of them, by the same factor, up to `highest`."""
    factor = math.log(rates[-1] / rates[-2])
    more = int(math.log(highest / rates[-1]) / factor + 1e-9) if highest > rates[-1] else 0
    return (*rates, *(rates[-1] * math.exp(factor * (index + 1)) for index in range(more)))


def middle(half_way: float, half_way_up: float, steps_per_e: float) -> float:
    """Of a valley at half its depth, see the module; `steps_per_e` of the test that found the first side."""
    return math.sqrt(half_way * max(1.0, steps_per_e / REFERENCE) * half_way_up)
