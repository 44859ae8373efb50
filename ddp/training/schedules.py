"""The learning rate as a function of the step: nothing to save in a checkpoint, nothing to restore."""

from __future__ import annotations

import math

from ddp.job import ScheduleSection


def learning_rate(step: int, steps: int, peak: float, section: ScheduleSection) -> float:
    """The rate for step `step` (1 for the first) of `steps`.

    It rises in a straight line, peak / warmup_steps in the first step and `peak` in step warmup_steps. From
    there "constant" stays; "cosine" falls along half a cosine to final_fraction * peak in the last step
    (Loshchilov and Hutter 2017, equation 5, without restarts). Beyond the last step it stays there.
    """
    if step < section.warmup_steps:
        return peak * step / section.warmup_steps
    if section.name == "constant":
        return peak
    top = max(section.warmup_steps, 1)
    progress = min((step - top) / (steps - top), 1.0) if steps > top else 0.0
    falling = (1 + math.cos(math.pi * progress)) / 2
    return peak * (section.final_fraction + (1 - section.final_fraction) * falling)
