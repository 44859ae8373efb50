"""How the learning rate follows the global batch size: factors on a rate that was tuned at another one.

    none         1
    linear       b/b0                               Goyal et al. 2017 (arXiv:1706.02677): SGD, b well below B
    sqrt         sqrt(b/b0)                         Krizhevsky 2014 (arXiv:1404.5997); Adam: Malladi et al. 2022
                                                    (arXiv:2205.10287)
    noise_scale  ((1 + B/b0)/(1 + B/b))^e           McCandlish et al. 2018 (arXiv:1812.06162, equation 2.9): the best
                                                    rate at b is eps_max/(1 + B/b); e = 1 for SGD, 1/2 for Adam
    adascale     ((S/b0 + |G|^2)/(S/b + |G|^2))^e   Johnson et al. 2020 (arXiv:2007.05105): the gain r is by how much
                                                    one step goes further than one at b0; the schedule advances by it

with b the present global batch size, b0 the tuned one and B the noise scale, all in examples. The last two are one
formula, B = S/|G|^2: noise_scale takes B from resolved readings only, and steps stay steps; adascale takes the
running means as they are and counts its run in steps at b0.
"""

from __future__ import annotations

import math
from typing import Literal

Rule = Literal["none", "linear", "sqrt", "noise_scale", "adascale"]


def rate_factor(rule: Rule, tuned: float, batch: float, noise_scale: float = math.nan, exponent: float = 1.0) -> float:
    """What to multiply a learning rate tuned at `tuned` examples a step with at `batch` examples a step.

    Args:
        noise_scale: B in examples, 0 to infinity; NaN while none is resolved, where the two rules that need it
            take the square root of b/b0 instead (noise_scale) or stay at 1 (adascale).
        exponent: e of noise_scale and adascale; the other rules have none.

    Returns:
        Between 1 and b/b0, exactly 1.0 at the tuned batch size.

    Raises:
        ValueError: a batch size is not above 0, or the noise scale is negative.
    """
    if not (tuned > 0 and batch > 0):
        raise ValueError(f"batch sizes must be above 0: {tuned}, {batch}")
    match rule:
        case "none":
            return 1.0
        case "linear":
            return batch / tuned
        case "sqrt":
            return math.sqrt(batch / tuned)
        case "noise_scale" if math.isnan(noise_scale):
            return math.sqrt(batch / tuned)
        case _:
            return 1.0 if math.isnan(noise_scale) else _gain_at(tuned, batch, noise_scale) ** exponent


def gain(variance_trace: float, squared_norm: float, tuned: float, batch: float) -> float:
    """AdaScale's r = (S/b0 + |G|^2)/(S/b + |G|^2), between 1 and b/b0, from running means of S and |G|^2.

    Means that are negative, as little data gives honestly, count as 0; without any (NaN, or both 0) it is 1.
    """
    return rate_factor("adascale", tuned, batch, clamped_noise_scale(variance_trace, squared_norm))


def clamped_noise_scale(variance_trace: float, squared_norm: float) -> float:
    """S/|G|^2 of running means, each at least 0, from 0 to infinity; NaN where there are none."""
    trace, norm = max(variance_trace, 0.0), max(squared_norm, 0.0)
    if math.isnan(variance_trace + squared_norm) or trace == norm == 0.0:
        return math.nan
    return trace / norm if norm > 0 else math.inf


def _gain_at(tuned: float, batch: float, noise_scale: float) -> float:
    if not noise_scale >= 0:
        raise ValueError(f"a noise scale is not negative: {noise_scale}")
    if noise_scale == math.inf:
        return batch / tuned
    return (1.0 + noise_scale / tuned) / (1.0 + noise_scale / batch)
