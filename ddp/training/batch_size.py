"""The global batch size that gets furthest in a second, from the noise scale and what steps cost.

A step at b examples costs a + c b seconds and is worth 1/(1 + B/b) of a step without noise (McCandlish et al. 2018,
arXiv:1812.06162, equation 2.7), so that the time for the same progress, (a + c b)(1 + B/b), is least at
b = sqrt(B a/c). Everything here is arithmetic in plain floats on numbers that all ranks have alike, the rows of all
ranks and the reading they share: so all ranks decide alike, and no clock of a rank's own has a say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ddp.noise.noise_scale import SMALLEST_WINDOW, Reading
from ddp.transport.row import StepRow

SMALLEST_CHANGE = 1.5  # a batch that is wrong by less costs next to nothing: (1 + r)^2/4r is 1.04 at r = 1.5
LARGEST_CHANGE = 2.0  # at once; the noise scale at the new size is not known yet
KEPT_STEPS = 25  # of one layout
KEPT_LAYOUTS = 4  # the newest
FEWEST_STEPS = 3  # of a layout before its median counts
TRIAL_STEPS = 6  # with twice the micro-batches, to tell their overhead from what examples cost: after so many steps,
TRIAL_GROWTH = 4  # and again after so many times as many, since machines change
SPEED_CHANGED = 1.2  # factor by which a layout takes longer, or less long, on what counts as another machine
SMALLEST_SHARE = 0.01  # of a step's work that its examples cost at least: a fit may find none in noise


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step costs in seconds: fixed + micro_batch m + example b, with m micro-batches a rank, b examples in all."""

    fixed: float  # averaging, row and optimizer
    micro_batch: float  # overhead of one forward and backward
    example: float  # of the whole batch: a rank's own cost over the number of ranks


@dataclass(frozen=True, slots=True)
class Limits:
    """What the batch may be; sizes in examples over all ranks."""

    smallest: int
    largest: int
    world_size: int
    micro_batch_size: int | None = None  # examples a rank may hold at once; None: as many as there are
    micro_batches: int = 1  # a rank has at least so many
    may_split: bool = True  # more of them leave the gradient as it is; not with batch statistics


@dataclass(frozen=True, slots=True)
class Change:
    """From the next step on the global batch size is `after`."""

    before: int
    after: int
    reason: str


class StepTimes:
    """Times of the newest steps by layout, (examples, micro-batches a rank), and the cost that fits them."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[int, int], list[tuple[float, float]]] = {}  # newest last: (work, fixed) seconds
        self._at_trial: tuple[tuple[int, int], float] = ((0, 0), 0.0)  # the newest layout when one began, and its work

    def add(self, layout: tuple[int, int], rows: Sequence[StepRow]) -> None:
        """One step of this layout, timed by the rows of all ranks; the slowest rank is the step's pace."""
        slowest = max(rows, key=_work)
        fixed = slowest.all_reduce_seconds + slowest.wait_seconds + slowest.optimizer_seconds
        steps = self._layouts.pop(layout, [])
        self._layouts[layout] = [*steps, (_work(slowest), fixed)][-KEPT_STEPS:]
        while len(self._layouts) > KEPT_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]

    def cost(self) -> StepCost | None:
        """The cost by medians over steps and least squares over layouts; None while too few steps are timed.

        The newest layout says what is fixed. Where layouts do not tell the overhead of a micro-batch from the cost of
        its examples (one layout, or micro-batches all of a size), examples carry all of it.
        """
        timed = {layout: steps for layout, steps in self._layouts.items() if len(steps) >= FEWEST_STEPS}
        if not timed:
            return None
        works = [(b, m, median(work for work, _ in steps)) for (b, m), steps in timed.items()]
        fixed = median(fixed for _, fixed in list(timed.values())[-1])
        b, m, work = works[-1]
        micro_batch, example = _split_work(works)
        if micro_batch < 0 or example * b < SMALLEST_SHARE * work:
            example = min(max(example, SMALLEST_SHARE * work / b), work / b)
            micro_batch = (work - example * b) / m
        return StepCost(max(fixed, 0.0), micro_batch, example)

    def begin_trial(self) -> None:
        """Where the newest layout takes another time than at the last trial, what others took was on another machine, in
        effect: forget them."""
        if not self._layouts:
            return
        layout, steps = list(self._layouts.items())[-1]
        now, (known, before) = median(work for work, _ in steps), self._at_trial
        if known == layout and not before / SPEED_CHANGED < now < before * SPEED_CHANGED:
            self._layouts = {layout: steps}
        self._at_trial = (layout, now)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        layouts = [[list(layout), [list(step) for step in steps]] for layout, steps in self._layouts.items()]
        layout, work = self._at_trial
        return {"layouts": layouts, "at_trial": [list(layout), work]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._layouts = {(int(b), int(m)): [(w, f) for w, f in steps] for (b, m), steps in state["layouts"]}
        (b, m), work = state["at_trial"]
        self._at_trial = (int(b), int(m)), float(work)


def best_batch_size(noise_scale: float, cost: StepCost, limits: Limits) -> float:
    """The global batch size at which a run makes most progress a second; not rounded, not limited.

    Up to what micro-batches hold, a larger batch makes them larger and their overhead is part of a; beyond, it
    makes more of them and their overhead is part of c.
    """
    together = cost.fixed + limits.micro_batches * cost.micro_batch
    if limits.micro_batch_size is None:
        return math.sqrt(noise_scale * together / cost.example)
    held = limits.world_size * limits.micro_batch_size
    growing = math.sqrt(noise_scale * together / cost.example)
    accumulating = math.sqrt(noise_scale * cost.fixed / (cost.example + cost.micro_batch / held))
    return max(min(growing, held * limits.micro_batches), accumulating)


class BatchSizeController:
    """Follows `best_batch_size` in steps of at most a doubling, one for each window of fresh observations."""

    def __init__(self, limits: Limits, size: int) -> None:
        self.limits, self.size = limits, size
        self._times = StepTimes()
        self._steps = 0  # since the start
        self._fresh = 0  # observations since the last change
        self._observations = 0
        self._timed: tuple[int, int] | None = None  # layout of the step that the next rows time
        self._usual = 1  # micro-batches of the newest step that was no trial: halves for the noise scale count

    @property
    def micro_batch_size(self) -> int:
        """Examples a rank holds at once in the next step: of even micro-batches, as few as the limits allow.

        A few steps now and then take twice as many as others: the same gradient, and a second point for the times.
        """
        return -(-self._share // (2 * self._parts if self._on_trial else self._fewest))

    @property
    def _share(self) -> int:
        return -(-self.size // self.limits.world_size)

    @property
    def _fewest(self) -> int:
        """Micro-batches a rank has at least."""
        held = self.limits.micro_batch_size or self._share
        return max(self.limits.micro_batches, -(-self._share // held))

    @property
    def _on_trial(self) -> bool:
        """Whether the next step takes twice the micro-batches, of two examples at least."""
        if not self.limits.may_split or self._steps < TRIAL_STEPS or self._share < 4 * self._parts:
            return False
        return self._steps - _last_trial(self._steps) < TRIAL_STEPS

    @property
    def _parts(self) -> int:
        return max(self._fewest, self._usual)

    def observe(
        self, examples: int, micro_batches: int, rows: Sequence[StepRow], reading: Reading | None
    ) -> Change | None:
        """Take one step: its examples over all ranks, its micro-batches a rank, its rows and the headline reading.

        The times in the rows are those of the step before.
        """
        if self._timed is not None:
            self._times.add(self._timed, rows)
        if not self._on_trial:
            self._usual = micro_batches
        self._timed = (examples, micro_batches) if examples == self.size else None
        self._steps += 1
        if self._on_trial and _last_trial(self._steps) == self._steps:
            self._times.begin_trial()
        if reading is None:
            return None
        self._fresh += reading.observations != self._observations
        self._observations = reading.observations
        ready = self._fresh >= SMALLEST_WINDOW and reading.state == "resolved" and not self._on_trial
        change = self._decide(reading) if ready else None
        if change is not None:
            self.size, self._fresh, self._timed = change.after, 0, None
        return change

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. The step whose times are not known yet is left out: another process would time it."""
        return {
            "size": self.size,
            "steps": self._steps,
            "usual": self._usual,
            "fresh": self._fresh,
            "observations": self._observations,
            "times": self._times.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, same_ranks: bool) -> None:
        """Go on from `state_dict()`. Times of another number of ranks say nothing about this one's."""
        self.size = min(max(int(state["size"]), self.limits.smallest), self.limits.largest)
        self._fresh, self._observations = int(state["fresh"]), int(state["observations"])
        self._timed = None
        if same_ranks:
            self._steps, self._usual = int(state["steps"]), int(state["usual"])
            self._times.load_state_dict(state["times"])

    def _decide(self, reading: Reading) -> Change | None:
        cost = self._times.cost()
        if cost is None:
            return None
        best = best_batch_size(reading.noise_scale, cost, self.limits)
        wished = min(max(best, self.size / LARGEST_CHANGE), self.size * LARGEST_CHANGE)
        after = self._rounded(wished)
        if min(_ratio(wished, self.size), _ratio(after, self.size)) < SMALLEST_CHANGE:  # rounding alone is no reason
            return None
        return Change(self.size, after, _reason(reading, cost, best, self.limits))

    def _rounded(self, size: float) -> int:
        """Near `size`, which is at most a doubling from the present one, and so no farther; inside the limits.

        The same share for each rank, and beyond one micro-batch full ones, where that is a change worth making.
        """
        ranks, held = self.limits.world_size, self.limits.micro_batch_size
        parts = [ranks] if held is None or size <= ranks * held else [ranks * held, ranks]
        for part in parts:
            nearest = part * max(round(size / part), 1)
            for even in (nearest, nearest + part * (1 if nearest < size else -1)):
                if even > 0 and SMALLEST_CHANGE <= _ratio(even, self.size) <= LARGEST_CHANGE:
                    return self._limited(even)
        return self._limited(round(size))

    def _limited(self, size: int) -> int:
        return min(max(size, self.limits.smallest), self.limits.largest)


def _ratio(one: float, other: float) -> float:
    return max(one / other, other / one)


def _last_trial(steps: int) -> int:
    """The step, TRIAL_STEPS or later, at which the last trial began."""
    began = TRIAL_STEPS
    while began * TRIAL_GROWTH <= steps:
        began *= TRIAL_GROWTH
    return began


def _work(row: StepRow) -> float:
    """Without the hooks of a sampled step, which are not what a batch costs."""
    hooks = max(row.measuring_seconds - row.measure_seconds, 0.0)
    return max(row.data_seconds + row.forward_seconds + row.backward_seconds - hooks, 0.0)


def _split_work(works: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """(p, c) of work = p m + c b by least squares of relative errors; (0, work/b) where layouts do not tell."""
    mm = mb = bb = m1 = b1 = 0.0
    for b, m, work in works:
        x, y = m / work, b / work
        mm, mb, bb, m1, b1 = mm + x * x, mb + x * y, bb + y * y, m1 + x, b1 + y
    determinant = mm * bb - mb * mb
    if determinant <= 1e-3 * mm * bb:  # micro-batches of all layouts alike to 3 %
        return 0.0, works[-1][2] / works[-1][0]
    return (m1 * bb - b1 * mb) / determinant, (b1 * mm - m1 * mb) / determinant


def _reason(reading: Reading, cost: StepCost, best: float, limits: Limits) -> str:
    fixed = 1e3 * (cost.fixed + limits.micro_batches * cost.micro_batch)
    return (
        f"noise scale {reading.noise_scale:.0f} ({reading.low:.0f}-{reading.high:.0f}), a step takes {fixed:.2g} ms + "
        f"{1e3 * cost.example:.2g} ms an example: fastest at {best:.0f}"
    )
