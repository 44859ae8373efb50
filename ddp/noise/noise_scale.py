from __future__ import annotations
from dataclasses import dataclass
from typing import Literal

State = Literal["unresolved", "beyond_data", "lower_bound", "wide", "resolved"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the noise scale is believed to be after some observed step (all in examples unless said).

    `noise_scale`, `low` and `high` are NaN while unresolved; `high` may be infinite.
    """

    state: State
    noise_scale: float
    low: float
    high: float
    squared_norm: float  # <|G|^2>: mean over the window, squared units of the gradient
    variance_trace: float  # <S>: estimates tr(Sigma) of one example
    observations: int  # observed since the start
    window: int  # observations the reading rests on
    steps_needed: float  # observations until high/low <= 4 at the present rate; NaN where unknown
    drifting: bool  # Newey-West variance disagrees with the first-difference one
