"""Are the ranks' shards what the noise scale assumes: different examples, drawn alike?

Two faults make every number wrong while training goes on as if nothing were: ranks that see the same data, and
ranks that see different kinds of data, sorted by class say. Both show in what the ranks' rows say of their gradients.
Copies of the same data under dropout or augmentation of their own do not: their gradients differ.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

DIRECTIONS = 4  # on which gradients are projected, in turns
COPIES = 5  # successive steps in which gradients must be equal
PAIRS = (40, 200)  # of steps on the same direction: fewest for a verdict, and the newest that count
ALARM = 6.0  # z above which shards are not exchangeable
_EQUAL = 1e-5  # relative: the same examples in another order or another bucket
_ALIKE = 2 / 3  # fewest over most examples of a rank, above which the ranks' gradients are distributed alike

_REMEDY = "torch.utils.data.DistributedSampler with shuffle=True, and set_epoch(epoch) in every epoch"


class ShardWatch:
    """Watches one number and one norm a rank and step; speaks up once for each of the two faults.

    Copies: own squared norms and projections equal in `COPIES` successive steps.

    Shards not drawn alike: let u_t be the ranks' deviations from their mean projection in step t, shape (ranks,),
    scaled to length 1. If shards are exchangeable, any permutation of the ranks is as likely, whatever came before, so
    that q_t = u_t . u_{t+DIRECTIONS} has mean 0 given the past: with two ranks it is a fair coin, for any
    distribution of gradients, however they drift. Where one rank's gradient differs from another's in step after step
    the mean is above 0. z = sum q / sqrt(sum q^2) over the newest 40 to 200 pairs; an alarm at z > 6 has the
    probability 1e-9 or less in one window (with two ranks it is binomial), under 1e-4 in 100,000 steps.

    Simulated: 2 to 8 ranks, Gaussian, t2 and lognormal gradients, drifting or not, 4 million steps: no z above 4.6.
    Digits sorted by class, 8 to 32 examples a rank, SGD and Adam: z of 5 to 10 after 160 steps with 2 ranks, 9 to 10 with
    3 and 4; one direction alone missed one case in six, because it may lie across the difference. The share of the own
    squared norm, watched in the same way, stayed below 7 and mostly below 3: it is not used.
    """

    def __init__(self) -> None:
        self._labels: deque[list[int]] = deque(maxlen=COPIES)
        self._deviations: deque[list[float] | None] = deque(maxlen=DIRECTIONS)
        self._products: deque[float] = deque(maxlen=PAIRS[1])
        self._copies_named = self._sorted_named = False

    def observe(
        self, own_squared_norms: Sequence[float], projections: Sequence[float], examples: Sequence[float] | None = None
    ) -> str | None:
        """Take one step; returns a sentence that names a fault and what to do, the first time it shows.

        Args:
            own_squared_norms: of each rank's own gradient.
            projections: of each rank's own gradient, on the same direction for all ranks; step t and step
                t + `DIRECTIONS` have the same.
            examples: of each rank. Where they differ by more than a third, gradients are not distributed alike even
                if shards are, and the step says nothing of the second fault. Equal if left out.
        """
        usable = len(projections) > 1 and math.isfinite(sum(projections) + sum(own_squared_norms))
        labels = _labels(own_squared_norms, projections) if usable else []
        even = not examples or min(examples) >= _ALIKE * max(examples)
        deviations = _deviations(projections) if usable and even else None
        return self._copied(labels) or self._unlike(deviations)

    def _copied(self, labels: list[int]) -> str | None:
        self._labels.append(labels)
        if self._copies_named or len(self._labels) < COPIES or not all(self._labels):
            return None
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, key in enumerate(zip(*self._labels, strict=True)):
            groups.setdefault(key, []).append(rank)
        copies = [ranks for key, ranks in groups.items() if len(ranks) > 1 and -1 not in key]
        if not copies:
            return None
        self._copies_named = True
        who = "all ranks" if len(copies[0]) == len(labels) else " and ".join(_named(ranks) for ranks in copies)
        return (
            f"{who} see the same data: their gradients are equal in {COPIES} successive steps, so that the noise scale "
            f"is meaningless and the extra ranks are wasted: give each rank its own shard, e.g. {_REMEDY}"
        )

    def _unlike(self, deviations: list[float] | None) -> str | None:
        before = self._deviations[0] if len(self._deviations) == DIRECTIONS else None
        self._deviations.append(deviations)
        if self._sorted_named or before is None or deviations is None or len(before) != len(deviations):
            return None
        self._products.append(math.fsum(map(float.__mul__, before, deviations)))
        z = self.z
        if not z > ALARM:
            return None
        self._sorted_named = True
        return (
            f"the ranks' gradients differ in the same way step after step (z = {z:.1f} over {len(self._products)} pairs "
            "of steps): their shards are not drawn alike, sorted by class or the same in every epoch, and the noise "
            f"scale is too large: shuffle the data before they are dealt out, e.g. {_REMEDY}"
        )

    @property
    def z(self) -> float:
        """Standard deviations by which successive deviations agree more than chance; 0 until there are enough."""
        squares = math.fsum(product * product for product in self._products)
        if len(self._products) < PAIRS[0] or not squares > 0:
            return 0.0
        return math.fsum(self._products) / math.sqrt(squares)


def _labels(norms: Sequence[float], projections: Sequence[float]) -> list[int]:
    """Ranks with equal gradients get equal labels; -1 where a gradient is zero, which says nothing."""
    labels, label, previous = [-1] * len(norms), 0, None
    for rank in sorted(range(len(norms)), key=lambda rank: (norms[rank], projections[rank])):
        if not norms[rank] > 0:
            continue
        if previous is not None and not _equal(norms, projections, previous, rank):
            label += 1
        labels[rank], previous = label, rank
    return labels


def _equal(norms: Sequence[float], projections: Sequence[float], one: int, other: int) -> bool:
    length = max(norms[one], norms[other])
    scale = max(abs(projections[one]), math.sqrt(length))
    return (
        abs(norms[one] - norms[other]) <= _EQUAL * length
        and abs(projections[one] - projections[other]) <= _EQUAL * scale
    )


def _deviations(projections: Sequence[float]) -> list[float] | None:
    """From their mean, as a vector of length 1; None where they are equal, but for rounding."""
    mean = math.fsum(projections) / len(projections)
    deviations = [value - mean for value in projections]
    length = math.hypot(*deviations)
    if not length > _EQUAL * max(map(abs, projections)):
        return None
    return [value / length for value in deviations]


def _named(ranks: Sequence[int]) -> str:
    first = ", ".join(map(str, ranks[:8]))
    return f"ranks {first}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"
