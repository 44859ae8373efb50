"""What the loss curve's shape says of the learning rate, the batch and the initialisation (Stanford CS231n, part 3).

A shape alone says little: a loss may fall in a line or stand still for good reasons. So where the learning rate is to
blame, the ratio of updates to weights has to agree.
"""

from __future__ import annotations

import math

from ddp.watching.finding import Finding
from ddp.watching.loss_curve import LossCurve

EXPLODED = 3.0  # times the loss at the start
FLAT_STEPS, SHAPE_STEPS = 100, 200
FLAT = 0.01  # of the loss at the start
LINE = 0.75  # the later half falls by so much of the earlier one's fall
SLOW_RATIO, FAST_RATIO = 3e-4, 3e-2  # of update to weight norm, to agree that a rate is low or high
FAST_FALL, PLATEAU = 0.8, 0.05  # of the whole fall: in the first tenth; and in the last six
STILL_HIGH = 0.2  # of the loss at the start
WIGGLE = 0.5  # of the whole fall


def curve_findings(curve: LossCurve, ratio: float) -> list[Finding]:
    """What stands out so far.

    Args:
        ratio: of update to weight norm, the median layer's at the latest look; NaN where it is not known.
    """
    steps, start = curve.steps, curve.start
    if steps < 20 or not start > 0:  # a loss that may be negative has no scale to hold it against
        return []
    if curve.latest(max(10, steps // 20)) > EXPLODED * start:
        return [_exploding(curve)]
    if steps >= FLAT_STEPS and _is_flat(curve):
        return [_flat(curve, ratio)]
    if steps < SHAPE_STEPS:
        return []
    found = [_wiggling(curve)] if _wiggles(curve) else []
    if ratio < SLOW_RATIO and _is_a_line(curve):
        found.append(_too_linear(ratio))
    if ratio > FAST_RATIO and _is_a_plateau(curve):
        found.append(_plateau(curve, ratio))
    return found


def _exploding(curve: LossCurve) -> Finding:
    return Finding(
        "the loss explodes",
        f"it was {curve.start:.3g} at the start and is {curve.latest(10):.3g}: lower the learning rate, warm it up, or clip the "
        "gradient (optimizer.gradient_clip_norm)",
    )


def _is_flat(curve: LossCurve) -> bool:
    return curve.start - curve.mean(2 / 3, 1) < FLAT * curve.start


def _flat(curve: LossCurve, ratio: float) -> Finding:
    cause = "the initialisation is bad, or the data does not tell what is asked: try another one (Kaiming, Xavier), and `check`"
    if ratio < SLOW_RATIO:
        cause = f"updates are {ratio:.1g} of the weights: the learning rate is too low, or the initialisation bad"
    return Finding(
        "the loss does not fall",
        f"it began at {curve.start:.3g} and is {curve.mean(2 / 3, 1):.3g} after {curve.steps:,} steps; unless the model came trained, "
        f"{cause}",
    )


def _is_a_line(curve: LossCurve) -> bool:
    """The later half of the curve falls nearly as much as the earlier one, and both more than they wiggle."""
    first, middle, last = curve.mean(0, 0.1), curve.mean(0.45, 0.55), curve.mean(0.9, 1)
    noise = curve.wiggle(0, 1) / math.sqrt(curve.steps / 10)
    earlier, later = first - middle, middle - last
    return min(earlier, later) > 4 * noise and LINE * earlier < later < earlier / LINE


def _too_linear(ratio: float) -> Finding:
    return Finding(
        "the loss falls in a line",
        f"no bend so far, and updates are {ratio:.1g} of the weights: the learning rate is too low; multiply it by 3 to 10",
    )


def _is_a_plateau(curve: LossCurve) -> bool:
    whole = curve.start - curve.mean(0.9, 1)
    early, late = curve.start - curve.mean(0.08, 0.12), abs(curve.mean(0.4, 0.5) - curve.mean(0.9, 1))
    return (
        whole > 0
        and early > FAST_FALL * whole
        and late < PLATEAU * whole
        and curve.mean(0.9, 1) > STILL_HIGH * curve.start
    )


def _plateau(curve: LossCurve, ratio: float) -> Finding:
    return Finding(
        "the loss stands on a plateau",
        f"it fell fast and stays at {curve.mean(0.9, 1):.3g}, and updates are {ratio:.1g} of the weights: the learning rate is too "
        "high; divide it by 3 to 10, or let it decay",
    )


def _wiggles(curve: LossCurve) -> bool:
    fall = curve.start - curve.mean(0.75, 1)
    return fall > 0 and curve.wiggle(0.5, 1) > WIGGLE * fall


def _wiggling(curve: LossCurve) -> Finding:
    return Finding(
        "the loss wiggles",
        f"by {curve.wiggle(0.5, 1):.2g} from step to step, and has fallen by {curve.start - curve.mean(0.75, 1):.2g} in all: the batch is too "
        "small; take a larger one, or a lower learning rate",
    )
