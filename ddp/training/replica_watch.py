"""Compares all ranks' parameters now and then, in the row of the step after, and whenever they are saved.

Every rank makes the same step of the same mean gradient: where parameters differ, memory, a processor or a program went
wrong on a rank. A checkpoint gets its name only after they have been compared, so that all that have one are whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ddp.errors import ReplicaError
from ddp.training.replica_comparison import compare
from ddp.training.replicas import checksum, halves, verdict, whole
from ddp.transport.row import StepRow

logger = logging.getLogger("ddp.training")


class ReplicaWatch:
    """Of one model; all ranks call it alike.

    Args:
        every_steps: steps between comparisons; False: only what is saved is compared.
    """

    def __init__(self, module: nn.Module, every_steps: int | bool, *, rank: int, world_size: int) -> None:
        self._module, self._rank, self._world_size = module, rank, world_size
        self._every_steps = int(every_steps)
        self._step = -1  # after which the checksum was taken that the next row carries; -1: none
        self._value = 0
        self._alike_at = 0  # the last step after which they were the same
        self._drifts = False

    def take(self, step: int) -> None:
        """Take the checksum after `step`, which the row of the next one carries."""
        if self._world_size > 1 and not self._drifts and self._step != step:
            self._step, self._value = step, checksum(self._module.parameters())

    def take_if_due(self, step: int) -> None:
        """After each step."""
        if self._every_steps and step % self._every_steps == 0:
            self.take(step)

    def row_fields(self) -> dict[str, float]:
        """What this rank's row says of it."""
        if self._step < 0:
            return {}
        high, low = halves(self._value)
        return {"checksum_high": high, "checksum_low": low}

    def observe(self, rows: Sequence[StepRow]) -> None:
        """Compare what the rows say, where they say something.

        Raises:
            ReplicaError: the parameters differ, on all ranks; says where, and on which rank.
        """
        if self._step >= 0:
            self._judge([whole(row.checksum_high, row.checksum_low) for row in rows])

    def compare_now(self, step: int) -> None:
        """As `take` and `observe` at once. Collective."""
        self.take(step)
        if self._step < 0:
            return
        everyones = [torch.zeros(2, dtype=torch.float64) for _ in range(self._world_size)]
        dist.all_gather(everyones, torch.tensor(halves(self._value), dtype=torch.float64))
        self._judge([whole(*each.tolist()) for each in everyones])

    def _judge(self, values: Sequence[int]) -> None:
        step, self._step = self._step, -1
        suspects = verdict(values)
        if suspects is None:
            self._alike_at = step
            return
        found = compare(self._module.named_parameters())
        if found is not None and found.drift:
            self._drifts = True
            if self._rank == 0:
                logger.warning("%s; they are not compared any more", found.text)
            return
        ranks = found.ranks if found is not None and found.ranks else suspects.ranks if suspects.decided else ()
        what = found.text if found is not None else suspects.in_words()
        error = ReplicaError(
            f"the ranks' parameters were found to differ after step {step}: {what}. Memory, a processor or a program went "
            f"wrong there; after step {self._alike_at} they were the same, and no checkpoint of later ones was kept: go on "
            "with --resume auto, without that machine if it happens again"
        )
        error.rank = ranks[0] if len(ranks) == 1 else -1
        raise error
