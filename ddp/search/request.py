"""What one trial is to be. Loads no torch: trials are planned where nothing is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddp.search.store import TrialMethod


@dataclass(frozen=True, slots=True)
class Trial:
    """A run to be made.

    Attributes:
        targets: losses to reach, falling; none for a run of `maximum_steps`.
        maximum_steps: the budget.
        hopeless_steps: after which a run that has not reached the last target cannot be the best any more; never
            below what the best known run took.
        origin: the checkpoint that it begins at; empty for one that begins at the beginning.
        multiple: with an origin, the batch size over that of the checkpoint's run.
    """

    method: TrialMethod
    batch_size: int
    learning_rate: float
    seed: int
    targets: tuple[float, ...]
    maximum_steps: int
    hopeless_steps: float = math.inf
    origin: str = ""
    multiple: float = math.nan

    @property
    def key(self) -> tuple[str, int, float, int]:
        return self.method, self.batch_size, self.learning_rate, self.seed
