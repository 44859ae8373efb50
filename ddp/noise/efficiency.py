"""What a batch size costs, at a noise scale B: McCandlish et al. 2018 (arXiv:1812.06162, equations 2.7 to 2.11).

To one loss a run at a global batch of b examples needs S = S_min (1 + B/b) steps and E = E_min (1 + b/B)
examples. Everything here takes b and B in examples, accepts B = 0 and B = infinity, gives NaN for a B that is
NaN or below 0, and is monotonic in B: so an interval of B gives an interval of the result by its two ends
(`between`), with the same confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ddp.noise.estimate import Estimate
from ddp.noise.noise_scale import Reading


def noise_scale_of(reading: Reading) -> Estimate:
    """B as `reading` has it, NaN where it has none; of a lower bound the point and the high end are infinite."""
    point = math.inf if reading.high == math.inf and reading.state == "lower_bound" else reading.noise_scale
    return Estimate(point, reading.low, reading.high)


def between(function: Callable[[float], float], noise_scale: Estimate) -> Estimate:
    """`function` of B, which rises or falls all along, at the point and at both ends of B."""
    ends = function(noise_scale.low), function(noise_scale.high)
    return Estimate(function(noise_scale.value), min(ends), max(ends))


def data_efficiency(noise_scale: float, global_batch_size: float) -> float:
    """1/(1 + b/B): examples a run would need at a tiny batch, over those it needs at b."""
    if noise_scale == 0:
        return 0.0
    return 1.0 / (1.0 + global_batch_size / noise_scale) if noise_scale > 0 else math.nan


def step_efficiency(noise_scale: float, global_batch_size: float) -> float:
    """1/(1 + B/b): steps a run would need at a huge batch, over those it needs at b."""
    return 1.0 / (1.0 + noise_scale / global_batch_size) if noise_scale >= 0 else math.nan


def steps(noise_scale: float, global_batch_size: float, smallest_steps: float) -> float:
    """S = S_min (1 + B/b)."""
    efficiency = step_efficiency(noise_scale, global_batch_size)
    return smallest_steps / efficiency if efficiency else math.inf


def examples(noise_scale: float, global_batch_size: float, smallest_examples: float) -> float:
    """E = E_min (1 + b/B)."""
    efficiency = data_efficiency(noise_scale, global_batch_size)
    return smallest_examples / efficiency if efficiency else math.inf


def steps_ratio(noise_scale: float, before: float, after: float) -> float:
    """Steps to one loss at the global batch `after`, over those at `before`: (1 + B/after)/(1 + B/before).

    1 for B = 0, where no batch is too small; before/after for B = infinity, where examples are all that counts.
    """
    return before / after * examples_ratio(noise_scale, before, after)


def examples_ratio(noise_scale: float, before: float, after: float) -> float:
    """Examples to one loss at the global batch `after`, over those at `before`: (B + after)/(B + before)."""
    if noise_scale == math.inf:
        return 1.0
    return (noise_scale + after) / (noise_scale + before) if noise_scale >= 0 else math.nan


def fastest_batch(noise_scale: float, step_seconds: float, example_seconds: float) -> float:
    """b* = sqrt(B a / c), the global batch that takes the least time where a step of b examples takes a + c b.

    The time to one loss is S_min (1 + B/b)(a + c b), least where a B / b^2 = c. It is not B: where nothing is
    lost by a step (a = 0) the smallest batch is best.

    Args:
        step_seconds: a, what a step takes whatever its batch: optimizer, all-reduce, launches.
        example_seconds: c, what one more example in the global batch adds; over R ranks a rank's own over R. 0 where it
            adds nothing: then the largest batch is best, infinity.
    """
    if math.isnan(noise_scale) or noise_scale < 0:
        return math.nan
    if not (step_seconds and noise_scale):
        return 0.0
    return math.sqrt(noise_scale * step_seconds / example_seconds) if example_seconds else math.inf
