"""The report's figures of what was watched: which there are, and what is said below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ddp.telemetry.charts import SIZE_INCHES, WIDE_INCHES, Drawing
from ddp.telemetry.histogram_chart import MOST_ROWS, What, histogram_chart
from ddp.telemetry.layer_charts import gap_chart, lost_units_chart, ratio_chart
from ddp.telemetry.records import EvaluationRecord, LayersRecord
from ddp.telemetry.report_page import Chart
from ddp.telemetry.weight_pictures_chart import weight_pictures_chart
from ddp.watching.layers import WeightPictures

DRAWN_LOOKS = 300

RATIO_CAPTION = (
    "Norm of a step's update over the norm of the weights, log scale. About 0.001 is usual; a hundred times more or less in most "
    "layers says that the learning rate is too high or too low."
)
UNITS_CAPTION = (
    "Dead: zero for all examples of the latest watched steps, over all ranks. Saturated: near the limits of tanh or sigmoid in "
    "95 % of them."
)
HISTOGRAM_CAPTIONS: dict[What, str] = {
    "activations": "What each layer put out for all examples of a step, over all ranks; logarithmic to both sides of zero.",
    "gradients": "The averaged gradient of each layer's parameters, before clipping; logarithmic to both sides of zero.",
}


def layer_figures(
    looks: Sequence[LayersRecord],
    pictures: Sequence[tuple[int, WeightPictures]],
    evaluations: Sequence[EvaluationRecord],
    metric: str,
) -> list[Chart]:
    """Under `charts.SETTINGS`."""
    figures = _both("Update to weight ratio of each layer", RATIO_CAPTION, lambda size: ratio_chart(looks, size))
    if (drawing := gap_chart(evaluations, metric, SIZE_INCHES)) is not None:
        caption = "A large gap asks for regularisation or more data; none, with both low, for a larger model."
        figures.append(Chart("Gap between training and validation", drawing, caption))
    if (drawing := lost_units_chart(looks, SIZE_INCHES)) is not None:
        figures.append(Chart("Dead and saturated units", drawing, UNITS_CAPTION))
    for what in ("activations", "gradients"):
        figures += _histograms(looks, what)
    return [*figures, *_pictures(pictures)]


def _both(title: str, caption: str, draw: Callable[[tuple[float, float]], Drawing | None]) -> list[Chart]:
    """Narrow and wide; [] where there is nothing to draw."""
    narrow, wide = draw(SIZE_INCHES), draw(WIDE_INCHES)
    return [] if narrow is None else [Chart(title, narrow, caption, wide)]


def _histograms(looks: Sequence[LayersRecord], what: What) -> list[Chart]:
    drawing = histogram_chart(looks, what, SIZE_INCHES[0])
    if drawing is None:
        return []
    layers = {layer.name for look in looks for layer in look.layers if getattr(layer, what) is not None}
    more = f" {len(layers) - MOST_ROWS:,} more layers are in run.db." if len(layers) > MOST_ROWS else ""
    return [Chart(f"Histograms of {what}", drawing, HISTOGRAM_CAPTIONS[what] + more)]


def _pictures(pictures: Sequence[tuple[int, WeightPictures]]) -> list[Chart]:
    """At the first look and at the latest one, beside each other."""
    charts: list[Chart] = []
    for step, each in pictures:
        count = each.shape[0]
        which = f"{count:,} of {each.total:,}" if count < each.total else f"All {count:,}"
        caption = f"{which} filters or units, each scaled by its own largest weight. Noise after long training says that it learns little."
        charts.append(
            Chart(f"First layer's weights ({each.layer}), step {step:,}", weight_pictures_chart(each), caption)
        )
    return charts
