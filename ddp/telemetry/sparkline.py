"""A row of numbers as one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddp.telemetry.progress import number_text

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """Finite positive values as bars on a log scale with both ends named; gaps stay gaps."""
    known = [math.log(value) for value in values if math.isfinite(value) and value > 0]
    if len(known) < 2:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    bars = "".join(
        BARS[round((math.log(value) - low) / span * (len(BARS) - 1))] if math.isfinite(value) and value > 0 else " "
        for value in values
    ).rstrip()
    return f"{number_text(math.exp(low))} {bars} {number_text(math.exp(max(known)))}"
