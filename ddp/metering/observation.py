"""From the rows of a step to one observation of the noise scale."""

from __future__ import annotations

from ddp.noise.moments import unbiased_moments
from ddp.noise.noise_scale import NoiseScaleWindow, Reading
from ddp.transport.row import StepRow


def observe_step(
    window: NoiseScaleWindow,
    rows: list[StepRow],
    mean_squared_norm: float,
    *,
    weights: list[float] | None = None,
    population: float = float("inf"),
) -> Reading:
    """Enter one step's rows into the window; a step that gives no observation leaves it as it was."""
    moments = unbiased_moments(
        [row.own_squared_norm for row in rows],
        [row.examples for row in rows],
        mean_squared_norm,
        weights=weights,
        population=population,
    )
    return window.reading if moments is None else window.observe(moments)
