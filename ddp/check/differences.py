"""One derivative from losses on both sides: an estimate with its uncertainty, and what it says of an analytic one.

A centred difference (L(w+h) - L(w-h)) / 2h is wrong by h^2 L'''/6 and by what rounding leaves of the losses, some
epsilon |L| / h. Neither is known beforehand, so several steps h are taken: where two neighbours agree, both are
small. The estimate is chosen without looking at the analytic gradient, which must not judge itself.

At a kink (ReLU, max-pooling) the one-sided differences disagree by the jump of the slope, however small the step; of a
smooth loss they disagree by h L'', which falls with h. What is seen at a kink is no fault of a gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

FIRST_STEPS = (1e-4, 1e-5, 1e-6)
MORE_STEPS = (1e-1, 1e-2, 1e-3, 1e-7, 1e-8)  # where the first do not settle it
ROUNDING = 8 * sys.float_info.epsilon  # of a loss, relative: sums of a few thousand terms
EXACT, RIGHT = 1e-7, 1e-4  # relative errors
CERTAIN = 3.0  # times its uncertainty a deviation has to be
SLOW_FALL = 0.3  # a tenth of the step leaves a tenth of the gap of a smooth loss, and all of a kink's
KINK_STEP = 2e-3  # a smooth loss may bend oddly over larger ones

Kind = Literal["judged", "zero", "kink", "unresolved"]


@dataclass(frozen=True, slots=True)
class Probe:
    """The losses at w + `forward` and w - `backward`, which differ from the step asked for by what w's float can hold."""

    forward: float
    backward: float
    above: float
    below: float

    @property
    def step(self) -> float:
        return (self.forward + self.backward) / 2

    @property
    def slope(self) -> float:
        return (self.above - self.below) / (self.forward + self.backward)

    @property
    def rounding(self) -> float:
        """What rounding of the losses alone may make of the slope."""
        return ROUNDING * max(abs(self.above), abs(self.below)) / self.step

    def gap(self, middle: float) -> float:
        """How much the slopes of the two sides disagree; `middle` is the loss at w."""
        return abs((self.above - middle) / self.forward - (middle - self.below) / self.backward)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A derivative, what it may be wrong by, and the part of that which rounding alone may make."""

    value: float
    uncertainty: float
    rounding: float


@dataclass(frozen=True, slots=True)
class Entry:
    """What the differences say of one entry of a gradient.

    Attributes:
        kind: "judged" by its `error`; "zero" where analytic and numeric are both zero, and the error is; at a "kink" or
            "unresolved" (rounding is as large as the deviation) nothing is said.
        error: |a - n| / max(|a|, |n|).
        resolved: whether the deviation is more than the estimate's own uncertainty.
    """

    kind: Kind
    numeric: float
    error: float
    resolved: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether further steps would bring nothing."""
        return self.kind == "zero" or (self.kind == "judged" and self.error <= EXACT)


def estimate(probes: Sequence[Probe]) -> Estimate:
    """From two neighbouring steps that agree best; not finite where no loss is."""
    ordered = sorted(probes, key=lambda probe: -probe.step)
    best = Estimate(math.nan, math.inf, 0.0)
    for coarse, fine in pairwise(ordered):
        change = abs(coarse.slope - fine.slope)
        if change <= fine.rounding:  # the finer one shows rounding only
            found = Estimate(coarse.slope, max(change, coarse.rounding), coarse.rounding)
        else:
            found = Estimate(fine.slope, change, fine.rounding)
        if found.uncertainty < best.uncertainty:
            best = found
    return best


def judge(analytic: float, middle: float, probes: Sequence[Probe]) -> Entry:
    """Compare an analytic derivative with the differences; `middle` is the loss where it was taken."""
    numeric = estimate(probes)
    if not (math.isfinite(analytic) and math.isfinite(numeric.value)):
        return Entry("judged", numeric.value, math.inf, resolved=True)
    size, deviation = max(abs(analytic), abs(numeric.value)), abs(analytic - numeric.value)
    if size <= CERTAIN * numeric.rounding:
        return Entry("zero", numeric.value, 0.0)
    error, resolved = deviation / size, deviation > CERTAIN * numeric.uncertainty
    if error > EXACT and _is_at_kink(middle, probes, deviation):
        return Entry("kink", numeric.value, error)
    if error > RIGHT and not resolved:
        return Entry("unresolved", numeric.value, error)
    return Entry("judged", numeric.value, error, resolved)


def _is_at_kink(middle: float, probes: Sequence[Probe], deviation: float) -> bool:
    ordered = sorted((probe for probe in probes if probe.step <= KINK_STEP), key=lambda probe: -probe.step)
    for coarse, fine in pairwise(ordered):
        gap = fine.gap(middle)
        explains = gap >= deviation / 2 and gap > CERTAIN * fine.rounding
        if explains and gap > SLOW_FALL * coarse.gap(middle):
            return True
    return False
