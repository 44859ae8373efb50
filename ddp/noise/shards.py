"""Are the ranks' shards what the noise scale assumes: different examples, drawn alike?

Two faults make every number wrong while training goes on as if nothing were: ranks that see the same data, and data
sorted by class say, whether each rank has a part of its own or they take them in turn (`ddp.noise.fixed_order`). Both
show in what the ranks' rows say of their gradients. Copies of the same data under dropout or augmentation of their own
do not: their gradients differ.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddp.noise.fixed_order import Deviations, FixedOrder

COPIES = 25  # successive steps in which gradients must be equal
PAIRS = (40, 200)  # of successive steps: fewest for a verdict, and the newest that count
ALARM = 6.0  # z above which shards are not exchangeable
_EQUAL = 1e-5  # relative: the same examples in another order or another bucket
_TURNED = 1e-2  # least change of a gradient's direction, as a distance of unit vectors, that draws of examples make
_ALIKE = 2 / 3  # fewest over most examples of a rank, above which the ranks' gradients are distributed alike

_REMEDY = "torch.utils.data.DistributedSampler with shuffle=True, and set_epoch(epoch) in every epoch"


class ShardWatch:
    """Watches a squared norm and a few projections a rank and step; speaks up once for each of the two faults.

    Copies: own squared norms and projections equal in `COPIES` successive steps, in each of which they point elsewhere
    than in the step before, by a hundredth at least. Gradients of data do: their examples are others in each step. What
    a penalty leaves where the data's gradient is zero is equal on all ranks too, but turns slowly or not at all.
    Ranks that all take the whole data set in each step are not told from that, and not named. Measured: copies on digits,
    text, linear and other regression, 4 to 512 examples, are named after 26 steps in 44 runs of 44; a fitted hinge loss
    with a penalty, whose ranks are equal for up to 361 steps, in none of 48.

    Shards not drawn alike: let U_t be the deviations of the ranks' projections from their mean in step t, shape (ranks,
    directions), scaled to length 1. If shards are exchangeable, any permutation of the rows of U_t is as likely as any
    other, whatever came before; over all permutations <U_t, U_{t-1}> has mean 0, because the rows add up to 0. So q_t =
    <U_t, U_{t-1}> has mean 0 given the past, for any distribution of gradients, however they drift. Where one rank's
    gradient differs from another's in step after step the mean is above 0. z = sum q / sqrt(sum q^2) over the newest 40
    to 200 pairs, an alarm at z > 6. Which of two ranks had which shard leaves their mean gradient, and so all that
    follows, as it was: the signs of q are fair coins, independent of each other and of all |q|, and P(z > 6) <= exp(-18)
    = 1.5e-8 in a window (Hoeffding).

    With more ranks q is not symmetric; simulated: 2, 4 and 8 ranks, Gaussian, t2, lognormal, rare and one-dimensional
    gradients that swing, 900,000 steps: no z above 3.8. Training on shuffled data: digits with and without BatchNorm, text,
    linear and other regression, a quadratic; SGD up to the largest learning rates, momentum, Adam; 2 to 8 ranks of 4 to 128
    examples; 476 runs, 218,000 steps: no z above 3.2. Digits sorted by class, 2, 4 and 8 ranks of 8 to 32, SGD, or Adam with
    BatchNorm: 128 runs of 128 are named in step 41 to 76.
    """

    def __init__(self) -> None:
        self._labels: deque[list[int]] = deque(maxlen=COPIES)
        self._before: NDArray[np.float64] | None = None
        self._deviations: Deviations | None = None
        self._products: NDArray[np.float64] = np.zeros(PAIRS[1])  # a ring
        self._pairs = 0  # so far
        self._order = FixedOrder()
        self._copies_named = self._sorted_named = False

    def observe(
        self, own_squared_norms: Sequence[float], projections: ArrayLike, examples: Sequence[float] | None = None
    ) -> str | None:
        """Take one step; returns a sentence that names a fault and what to do, the first time it shows.

        Args:
            own_squared_norms: of each rank's own gradient.
            projections: of each rank's own gradient, on the same directions in all steps, shape (ranks, directions).
            examples: of each rank. Where they differ by more than a third, gradients are not distributed alike even
                if shards are, and the step says nothing of the second fault. Equal if left out.
        """
        values = np.asarray(projections, np.float64)
        usable = len(values) > 1 and all(map(math.isfinite, own_squared_norms)) and bool(np.isfinite(values).all())
        even = not examples or min(examples) >= _ALIKE * max(examples)
        said = None if self._copies_named else self._copied(own_squared_norms, values if usable else None)
        if said is None and not self._sorted_named:
            deviations = _deviations(values) if usable and even else None
            said = self._unlike(deviations) or self._repeated(deviations)
        return said

    def state_dict(self) -> dict[str, Any]:
        """Plain values and bytes."""
        deviations = self._deviations
        return {
            "labels": list(self._labels),
            "before": None if self._before is None else self._before.tolist(),
            "deviations": deviations and [deviations.mean.tolist(), deviations.unit.tolist(), deviations.length],
            "products": self._products.astype("<f8").tobytes(),
            "pairs": self._pairs,
            "order": self._order.state_dict(),
            "named": [self._copies_named, self._sorted_named],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, with as many ranks or others: then what was seen of the old ones is forgotten."""
        self._labels = deque(state["labels"], maxlen=COPIES)
        self._before = None if state["before"] is None else np.array(state["before"], np.float64)
        self._deviations = None
        if state["deviations"] is not None:
            mean, unit, length = state["deviations"]
            self._deviations = Deviations(np.array(mean, np.float64), np.array(unit, np.float64), length)
        self._products = np.frombuffer(state["products"], "<f8").copy()
        self._pairs = int(state["pairs"])
        self._order.load_state_dict(state["order"])
        self._copies_named, self._sorted_named = state["named"]

    def _copied(self, norms: Sequence[float], projections: NDArray[np.float64] | None) -> str | None:
        before, self._before = self._before, projections
        if (
            projections is None
            or before is None
            or before.shape != projections.shape
            or not any(high - low <= _EQUAL * high for low, high in pairwise(sorted(norms)))
        ):
            self._labels.clear()
            return None
        turned = np.linalg.norm(_headings(projections) - _headings(before), axis=1) > _TURNED
        self._labels.append(_labels(np.asarray(norms), projections, turned))
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, key in enumerate(zip(*self._labels, strict=True)):
            if -1 not in key:
                groups.setdefault(key, []).append(rank)
        copies = [ranks for ranks in groups.values() if len(ranks) > 1]
        if not copies:
            self._labels.clear()
        if len(self._labels) < COPIES:
            return None
        self._copies_named = True
        who = "all ranks" if len(copies[0]) == len(norms) else " and ".join(_named(ranks) for ranks in copies)
        return (
            f"{who} see the same data: in {COPIES} successive steps their gradients were equal, and others than in the "
            "step before, so that the noise scale is meaningless and the extra ranks are wasted: check that each rank "
            f"reads a shard of its own, e.g. by {_REMEDY}"
        )

    def _unlike(self, deviations: Deviations | None) -> str | None:
        before, self._deviations = self._deviations, deviations
        if before is None or deviations is None or before.unit.shape != deviations.unit.shape:
            return None
        self._products[self._pairs % PAIRS[1]] = np.vdot(before.unit, deviations.unit)
        self._pairs += 1
        z = self.z
        if not z > ALARM:
            return None
        self._sorted_named = True
        return (
            f"the ranks' gradients differ in the same way step after step (z = {z:.1f} over "
            f"{min(self._pairs, PAIRS[1])} pairs of steps): their shards are not drawn alike, sorted by class or the "
            "same in every epoch, and the noise scale is too large: shuffle the data before they are dealt out, e.g. "
            f"by {_REMEDY}"
        )

    def _repeated(self, deviations: Deviations | None) -> str | None:
        repetition = self._order.observe(deviations)
        if repetition is None:
            return None
        self._sorted_named = True
        return (
            f"what tells the ranks apart repeats itself every {repetition.lag} full steps (z = {repetition.z:.1f}), so that the "
            "data come in the same order in every epoch; and their mean gradient changes "
            f"{repetition.ratio:.0f} times as much from step to step as their differences explain: the data look sorted, "
            "by class say, and dealt out to the ranks in turn, and the noise scale is too small: shuffle them in every "
            f"epoch, e.g. by {_REMEDY}"
        )

    @property
    def z(self) -> float:
        """Standard deviations by which successive deviations agree more than chance; 0 until there are enough."""
        if self._pairs < PAIRS[0]:
            return 0.0
        length = math.sqrt(float(np.vdot(self._products, self._products)))
        return math.fsum(self._products.tolist()) / length if length > 0 else 0.0


def _labels(norms: NDArray[np.float64], projections: NDArray[np.float64], turned: NDArray[np.bool_]) -> list[int]:
    """Ranks with equal gradients get equal labels; -1 where a gradient says nothing: it is zero, or has not turned."""
    order = np.argsort(norms, kind="stable")
    sorted_norms, values = norms[order], projections[order]
    scale = np.sqrt(sorted_norms[1:])
    far = np.abs(np.diff(values, axis=0)).max(axis=1) > _EQUAL * np.maximum(np.abs(values[1:]).max(axis=1), scale)
    far |= np.diff(sorted_norms) > _EQUAL * sorted_norms[1:]
    labels = np.empty(len(norms), np.int64)
    labels[order] = np.concatenate([[0], np.cumsum(far)])
    labels[~(turned & (norms > 0))] = -1
    return labels.tolist()


def _headings(projections: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each rank's projections as a vector of length 1; zero where they are."""
    lengths = np.linalg.norm(projections, axis=1, keepdims=True)
    return projections / np.where(lengths > 0, lengths, 1.0)


def _deviations(projections: NDArray[np.float64]) -> Deviations | None:
    """None where the ranks are equal, but for rounding."""
    mean: NDArray[np.float64] = projections.sum(axis=0) / len(projections)
    deviations = projections - mean
    length = math.sqrt(float(np.vdot(deviations, deviations)))
    if not length > _EQUAL * math.sqrt(float(np.vdot(projections, projections))):
        return None
    return Deviations(mean, deviations / length, length)


def _named(ranks: Sequence[int]) -> str:
    first = ", ".join(map(str, ranks[:8]))
    return f"ranks {first}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"
