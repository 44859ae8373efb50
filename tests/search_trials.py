"""Trials with a known answer, as a search would leave them in its store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddp.search.store import TrialMethod, TrialResult, write_trial

S_MIN = 80.0
SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


def simulated_trials(
    *,
    optimizer: str = "sgd",
    method: TrialMethod = "sweep",
    critical: Sequence[float] = (20.0, 60.0),
    targets: Sequence[float] = (1.0, 0.5),
    sizes: Sequence[int] = SIZES,
    noise: float = 0.03,
    seed: int = 0,
) -> Iterator[TrialResult]:
    """Three seeds over five learning rates around the best, whose valley is that of a quadratic loss.

    The second target takes twice the smallest number of steps; a step takes 1 ms and 10 us an example.
    Validation loss at the target is 1 + 0.02 log2 B, the noise scale on the way 0.8 (plain) of the critical batch size
    and 1.1 (preconditioned, not with SGD).
    """
    generator = np.random.default_rng(seed)
    for size in sizes:
        best_rate = 0.5 / (1 + critical[-1] / size)
        for factor in (0.25, 0.5, 0.75, 1.0, 1.4, 2.8):
            for number in range(3):
                diverged = factor > 2
                valley = math.nan if diverged else 1 / (2 * factor - factor**2)
                luck = math.exp(noise * generator.standard_normal())
                steps = tuple(
                    S_MIN * (1 + place) * (1 + each / size) * valley * luck for place, each in enumerate(critical)
                )
                unknown = (math.nan,) * len(targets)
                yield TrialResult(
                    optimizer=optimizer,
                    batch_size=size,
                    learning_rate=best_rate * factor,
                    seed=number,
                    method=method,
                    targets=tuple(targets),
                    steps_to_target=steps,
                    examples_to_target=tuple(each * size for each in steps),
                    validation_loss_at_target=unknown
                    if diverged
                    else tuple(1 + 0.02 * math.log2(size) + 0.001 * number for _ in targets),
                    validation_metric_at_target=unknown if diverged else tuple(0.9 - 0.001 * number for _ in targets),
                    seconds=3.0,
                    seconds_per_step=1e-3 + 1e-5 * size,
                    peak_memory_bytes=200 * 2**20 + 2**16 * size,
                    diverged=diverged,
                    stopped_because="diverged" if diverged else "targets",
                    curve=((0, 2.3), (1, 2.2)),
                    noise_plain=unknown if diverged else tuple(0.8 * each for each in critical),
                    noise_preconditioned=unknown
                    if diverged or optimizer == "sgd"
                    else tuple(1.1 * each for each in critical),
                )


def store(directory: Path, *groups: Iterator[TrialResult]) -> Path:
    """A search's directory that holds these trials."""
    for group in groups:
        for trial in group:
            write_trial(directory / "sweep.db", trial)
    return directory
