"""The [watching] table: what is looked at in each layer while a run trains, how often, and how finely."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ddp.job.fields import Positive, Section


class WatchingSection(Section):
    """Statistics of layers, and the warnings in words that come of them and of the curves."""

    enabled: bool = True
    every: Literal["auto"] | Positive = Field(
        default="auto",
        description="steps between those whose layers are looked at, beside the first; auto: so rarely that looking takes "
        "less than 1 % of the time as it is measured, and never more often than a two-hundredth of the steps so far",
    )
    activations: bool = Field(
        default=True, description="histograms of activations, dead and saturated units: forward hooks in those steps"
    )
    gradients: bool = Field(default=True, description="histograms of the averaged gradients")
    bins_per_octave: Literal[1, 2, 4] = Field(
        default=1, description="of the histograms, which are logarithmic: 1 has an edge at each power of two"
    )
    pictures: bool = Field(default=True, description="the first layer's weights, where they can be drawn as images")
    warnings: bool = Field(default=True, description="say once in words what looks wrong, and what to do")
