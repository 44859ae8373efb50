"""The running noise scale: observations in, a `Reading` with its interval and state out.

B = <tr(Sigma)> / <|G|^2>, averages first and ratio last, over a sliding window. Ratios of single steps
are never averaged and no step is clamped or dropped for its sign: both would bias B by far more than
its interval. Sums since the start would be stale (|G|^2 falls while training) and a moving average with
exponential weights would lag; a window of observations that agree does neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddp.errors import CheckpointError
from ddp.noise.interval import PairedMeans, ratio_interval, t_quantile
from ddp.noise.moments import Moments

State = Literal["unresolved", "beyond_data", "lower_bound", "wide", "resolved"]

WINDOW_SIZES = (25, 50, 100, 200, 400)  # observations
SMALLEST_WINDOW, LARGEST_WINDOW = WINDOW_SIZES[0], WINDOW_SIZES[-1]
WIDE = 4.0  # high/low above this is too wide to act on
CUT_SHORT = 1.2  # factor of t where older observations disagree
DRIFT = 2.0  # Newey-West variance over first-difference variance from which a window counts as drifting


@dataclass(frozen=True, slots=True)
class Reading:
    """What the noise scale is believed to be after some observed step (all in examples unless said).

    `noise_scale`, `low` and `high` are NaN while unresolved; `high` may be infinite, and so may
    `noise_scale` where only a lower bound exists. The target of the interval is the window's average.
    """

    state: State
    noise_scale: float
    low: float
    high: float
    squared_norm: float  # <|G|^2>: mean over the window, squared units of the gradient
    variance_trace: float  # <S>: estimates tr(Sigma) of one example
    observations: int  # observed since the start
    window: int  # observations the reading rests on
    steps_needed: float  # observations until high/low <= 4 at the present rate; NaN where unknown
    drifting: bool  # Newey-West variance disagrees with the first-difference one


class NoiseScaleWindow:
    """Keeps the last observations and reads the noise scale from those of them that agree.

    The window is the newest 25 observations, doubled up to 400 for as long as the two halves of the
    doubled window agree within two standard errors, both in tr(Sigma) and in |G|^2. It is chosen anew
    at every observation and newest first, so that it shrinks again as soon as they stop agreeing.

    The covariance of the window's means comes from first differences of successive observations, which a
    slow drift hardly touches; the t-quantile has that estimator's 2(n - 1)/3 degrees of freedom. Where
    older observations were left out for disagreeing it is taken 1.2 times: if nothing has changed, one window in
    three is cut short by chance, exactly when its newest observations lie off, and of those sets only 75 to 80 %
    would hold the truth; a real change leaves 95 %. Nothing tells the two apart. (A higher threshold than two
    standard errors would cut less by chance, but follow a falling |G|^2 later: benchmarks/noise_scale_coverage.py.)

    States, the first that applies:

        unresolved    under 25 observations, no bound, or a low end below 0
        beyond_data   low end above `training_examples`: the training set is nearly fitted
        lower_bound   no finite high end
        wide          high > 4 low
        resolved
    """

    def __init__(self, training_examples: int | None, confidence: float = 0.95) -> None:
        self._training_examples = math.inf if training_examples is None else training_examples
        self._t = {size: t_quantile(confidence, 2 * (size - 1) / 3) for size in WINDOW_SIZES}
        self._z = NormalDist().inv_cdf((1 + confidence) / 2)
        self._history = _History()
        self._observations = 0
        self._reading: Reading | None = None  # of the history as it is; None until somebody asks

    @property
    def observations(self) -> int:
        """Since the start."""
        return self._observations

    @property
    def reading(self) -> Reading:
        """The reading after the last observation; made when it is first asked for, then the same object."""
        if self._reading is None:
            self._reading = self._read()
        return self._reading

    def take(self, moments: Moments | None) -> None:
        """One step's moments; None, or moments that are not finite, are no observation. Makes no reading."""
        if moments is not None and math.isfinite(moments.variance_trace + moments.squared_norm):
            self._history.append(moments.variance_trace, moments.squared_norm)
            self._observations += 1
            self._reading = None

    def observe(self, moments: Moments | None) -> Reading:
        """`take` and `reading` in one."""
        self.take(moments)
        return self.reading

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; loaded into another window, it goes on bit for bit."""
        variance_trace, squared_norm = self._history.newest(LARGEST_WINDOW).tolist()
        return {
            "observations": self._observations,
            "variance_trace": variance_trace,
            "squared_norm": squared_norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; `training_examples` and `confidence` stay as constructed.

        Raises:
            CheckpointError: the state is not one that `state_dict` made.
        """
        try:
            observations = int(state["observations"])
            pairs = np.array([state["variance_trace"], state["squared_norm"]], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"noise scale state cannot be read: {error!r}") from error
        if pairs.ndim != 2 or pairs.shape[1] != min(observations, LARGEST_WINDOW) or not np.isfinite(pairs).all():
            raise CheckpointError(f"noise scale state of {observations} observations does not hold them all")
        self._history = _History()
        for variance_trace, squared_norm in pairs.T.tolist():
            self._history.append(variance_trace, squared_norm)
        self._observations = observations
        self._reading = None

    def _read(self) -> Reading:
        window, cut_short = self._history.widest_agreeing()
        size, means = window.size, window.means()
        factor = CUT_SHORT if cut_short else 1.0
        low, high = ratio_interval(means, factor * self._t[size]) if size >= SMALLEST_WINDOW else (math.nan, math.nan)
        state = state_of(low, high, self._training_examples)
        known = state != "unresolved"
        point = (means.x / means.y if means.y > 0 else math.inf) if known else math.nan
        return Reading(
            state=state,
            noise_scale=point,
            low=low if known else math.nan,
            high=high if known else math.nan,
            squared_norm=means.y,
            variance_trace=means.x,
            observations=self._observations,
            window=size,
            steps_needed=0.0 if high <= WIDE * low else steps_needed(means, size, self._z),
            drifting=size >= SMALLEST_WINDOW and _drifts(self._history.newest(size), means),
        )


def state_of(low: float, high: float, training_examples: float = math.inf) -> State:
    """The state that an interval means, for a window of enough observations; see `NoiseScaleWindow`."""
    if not low >= 0:  # also where it is NaN
        return "unresolved"
    if low > training_examples:
        return "beyond_data"
    if high == math.inf:
        return "lower_bound"
    return "wide" if high > WIDE * low else "resolved"


def steps_needed(means: PairedMeans, size: int, z: float = 1.96) -> float:
    """Further observations until high/low <= 4, where it is not yet, if they are like those of this window.

    Where |G|^2 carries most of the uncertainty, high/low = (1 + q)/(1 - q) with q = z sqrt(v/n) and
    v = n V(Y)/Y^2; that is 4 at q = 0.6, or n = 10.7 v at 95 % (and finite from n = 3.84 v).

    Returns:
        At least 1. Infinity where more are needed than the largest window holds, which more units a step
        would mend; NaN where <|G|^2> is not above 0 or fewer than 25 were observed.
    """
    if size < SMALLEST_WINDOW or not means.y > 0:
        return math.nan
    relative = size * means.variance_y / (means.y * means.y)
    total = math.ceil(min(relative * (z * (WIDE + 1) / (WIDE - 1)) ** 2, LARGEST_WINDOW + 1))
    return math.inf if total > LARGEST_WINDOW else float(max(total - size, 1))


@dataclass(slots=True)
class _Sums:
    """Sums over successive observations: of x and y, and of the products of their first differences."""

    size: int = 0
    x: float = 0.0
    y: float = 0.0
    dxdx: float = 0.0
    dydy: float = 0.0
    dxdy: float = 0.0

    def __add__(self, older: _Sums) -> _Sums:
        return _Sums(
            self.size + older.size,
            self.x + older.x,
            self.y + older.y,
            self.dxdx + older.dxdx,
            self.dydy + older.dydy,
            self.dxdy + older.dxdy,
        )

    def means(self) -> PairedMeans:
        """Means and their covariance: half the mean product of differences (von Neumann 1941), over n."""
        if self.size < 2:
            return PairedMeans(*((self.x, self.y) if self.size else (math.nan, math.nan)), math.nan, math.nan, math.nan)
        n = self.size
        scale = 2.0 * n * (n - 1)
        return PairedMeans(self.x / n, self.y / n, self.dxdx / scale, self.dydy / scale, self.dxdy / scale)

    def agrees(self, older: _Sums) -> bool:
        """Whether the means of two adjacent halves differ by at most two standard errors, in x and in y.

        Each half's mean has twice the variance V of the joint mean, their difference four times.
        """
        both, half = (self + older).means(), self.size
        dx, dy = (self.x - older.x) / half, (self.y - older.y) / half
        return dx * dx <= 16.0 * both.variance_x and dy * dy <= 16.0 * both.variance_y


class _History:
    """The newest observations, with the products of their first differences beside them.

    Sums are taken afresh at each observation, newest blocks first: running sums would drift, and would
    keep the rounding errors of long gone, far larger values.
    """

    def __init__(self) -> None:
        self._columns = np.zeros((5, 4 * LARGEST_WINDOW))  # x, y, dx dx, dy dy, dx dy
        self._end = 0

    def append(self, x: float, y: float) -> None:
        """Take one pair. A difference lies with the older of its two, so that the newest n columns
        hold exactly the n - 1 differences among them."""
        columns = self._columns
        if self._end == columns.shape[1]:
            columns[:, :LARGEST_WINDOW] = columns[:, -LARGEST_WINDOW:]
            self._end = LARGEST_WINDOW
        end = self._end
        if end:
            dx, dy = x - float(columns[0, end - 1]), y - float(columns[1, end - 1])
            columns[2:, end - 1] = (dx * dx, dy * dy, dx * dy)
        columns[:, end] = (x, y, 0.0, 0.0, 0.0)
        self._end = end + 1

    def newest(self, size: int) -> NDArray[np.float64]:
        """The newest pairs, shape (2, at most size), in the order they came."""
        return self._columns[:2, max(self._end - size, 0) : self._end]

    def widest_agreeing(self) -> tuple[_Sums, bool]:
        """The newest 25, doubled while the halves agree, and whether that ended before the observations did.

        All there are while they are fewer than 25.
        """
        newest, *older = self._blocks()
        for block in older:
            if not newest.agrees(block):
                return newest, True
            newest += block
        return newest, False

    def _blocks(self) -> list[_Sums]:
        """Sums of the newest 25, the 25 before, the 50 before those and so on: each doubles the window."""
        sizes = [size for size in WINDOW_SIZES if size <= self._end] or [self._end]
        largest = sizes[-1]
        if not largest:
            return [_Sums()]
        starts = [largest - size for size in reversed(sizes)]
        sums = np.add.reduceat(self._columns[:, self._end - largest : self._end], starts, axis=1).T.tolist()
        lengths = [sizes[0], *(larger - smaller for smaller, larger in pairwise(sizes))]
        return [_Sums(length, *block) for length, block in zip(lengths, reversed(sums), strict=True)]


def _drifts(pairs: NDArray[np.float64], means: PairedMeans) -> bool:
    """Whether either series' Newey-West variance of the mean is well above the first-difference one.

    It is where the mean moves inside the window, or successive observations are correlated. The lag is
    4 (n/100)^(2/9) (Newey and West 1994, Rev. Econ. Stud. 61, 631). Bartlett-weighted autocovariances
    are summed as squares of moving sums of the zero-padded series, which is the same number.
    """
    n = pairs.shape[1]
    width = int(4 * (n / 100) ** (2 / 9)) + 1
    sums = np.zeros((2, n + 2 * width))
    np.cumsum(pairs - [[means.x], [means.y]], axis=1, out=sums[:, width:-width])
    sums[:, -width:] = sums[:, -width - 1, None]
    moving = sums[:, width:] - sums[:, :-width]
    variance_x, variance_y = (np.square(moving).sum(axis=1) / (width * n * n)).tolist()
    return variance_x > DRIFT * means.variance_x or variance_y > DRIFT * means.variance_y
