"""The loss of a run over its steps: when to look at it, how to smooth it, when it reached a target.

Everything happens in log(loss) against log(step): there a training curve is nearly straight, so that a straight line
between two looks 5 % of the steps apart is off by far less than 1 %. Small batches make the loss itself
noisy, and the first look that happens to be low would count too early; a line fitted to the looks around each takes that
out, the same share of the steps at every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPACING = 1.05  # from one look to the next, in steps
DENSE_STEPS = 20  # every step up to here
HALF_WIDTH = math.log(1.12)  # of the neighbourhood that a look is smoothed over, in log(step)

Curve = Sequence[tuple[int, float]]  # (step, loss > 0), steps rising; step 0 may come first


def next_look(step: int) -> int:
    """The step after `step` at which to look again."""
    return step + 1 if step < DENSE_STEPS else math.ceil(step * SPACING)


def smoothed(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log(step) and the smoothed log(loss), both (n,), of the steps from 1 on whose neighbourhood lies on the curve.

    The fit is a straight line over the looks within HALF_WIDTH, weighted by (1 - u^2)^2 (Cleveland 1979, J. Am.
    Stat. Assoc. 74, 829, with a biweight); where only the look itself is that near, it stays as it is.
    """
    points = np.array([(step, loss) for step, loss in curve if step > 0], dtype=np.float64).reshape(-1, 2)
    x, y = np.log(points[:, 0]), np.log(points[:, 1])
    complete = int(np.searchsorted(x, x[-1] - HALF_WIDTH, side="right")) if len(x) else 0
    if not complete:
        return x[:0], y[:0]
    distance = x[None, :] - x[:complete, None]
    weight = np.square(np.maximum(1 - np.square(distance / (HALF_WIDTH * (1 + 1e-9))), 0.0))
    s0, s1, s2 = (np.sum(weight * distance**power, axis=1) for power in (0, 1, 2))
    t0, t1 = np.sum(weight * y, axis=1), np.sum(weight * distance * y, axis=1)
    determinant = s0 * s2 - s1 * s1
    alone = determinant <= 1e-12 * s0 * s0
    fitted = np.where(alone, t0 / s0, (s2 * t0 - s1 * t1) / np.where(alone, 1.0, determinant))
    return x[:complete], fitted


def steps_to_targets(curve: Curve, targets: Sequence[float]) -> tuple[float, ...]:
    """Steps at which the smoothed curve first comes down to each target, interpolated; NaN where it does not.

    A loss of step 0 at or below a target counts as 0 steps. The curve must go on for 12 % of its steps beyond
    the crossing, else the crossing is not known yet.
    """
    if any(not loss > 0 for _, loss in curve):
        raise ValueError("a loss at or below 0 has no logarithm")
    x, y = smoothed(curve)
    start = curve[0][1] if curve and curve[0][0] == 0 else math.inf
    return tuple(0.0 if start <= target else _crossing(x, y, math.log(target)) for target in targets)


def _crossing(x: NDArray[np.float64], y: NDArray[np.float64], level: float) -> float:
    below = np.flatnonzero(y <= level)
    if not len(below):
        return math.nan
    after = int(below[0])
    if not after:
        return math.exp(x[0])
    share = (level - y[after - 1]) / (y[after] - y[after - 1])
    return math.exp(x[after - 1] + share * (x[after] - x[after - 1]))


def value_at(steps: float, looks: Sequence[tuple[int, float]]) -> float:
    """A quantity seen at a few steps, interpolated in log(step); the nearest look's beyond them, NaN without any."""
    if not looks or not steps > 0:
        return math.nan
    x = [math.log(max(step, 0.5)) for step, _ in looks]
    return float(np.interp(math.log(steps), x, [value for _, value in looks]))


def loss_after(curve: Curve, steps: float) -> float:
    """The smoothed loss after `steps`, NaN where the curve does not go that far."""
    x, y = smoothed(curve)
    if not len(x) or math.log(steps) > x[-1]:
        return math.nan
    return math.exp(float(np.interp(math.log(steps), x, y)))
