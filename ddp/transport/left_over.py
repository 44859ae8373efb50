"""What quantising gradients has left over, bucket by bucket, as a state to go on from.

A transport keeps it with each bucket, in arrays whose addresses its kernels know. DDP builds its buckets in its
second backward: what a checkpoint holds waits here for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddp.transport.base import BucketState

State = Mapping[str, Mapping[int, Mapping[str, Tensor]]]


class LeftOver:
    """Of one model's buckets, by their index."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str, Tensor]] = {}

    def state_dict(self, buckets: Mapping[int, BucketState]) -> State:
        """Nothing where gradients travel as floating-point numbers; the tensors share the transport's memory."""
        kept = {index: _arrays(bucket) for index, bucket in buckets.items()}
        return {
            "left_over": {
                index: {name: torch.from_numpy(array) for name, array in each.items()}
                for index, each in kept.items()
                if each
            }
        }

    def load_state_dict(self, state: Mapping[str, Any], buckets: Mapping[int, BucketState]) -> None:
        """Go on from `state_dict()` where the buckets are the same, those that are still to come too; else with nothing."""
        self._waiting = {int(index): dict(each) for index, each in state["left_over"].items()}
        for index, bucket in buckets.items():
            self.hand_to(index, bucket)

    def hand_to(self, index: int, bucket: BucketState) -> None:
        """A bucket takes what is there for it, and forgets what it had."""
        for array in _arrays(bucket).values():
            array[:] = 0
        for name, saved in self._waiting.get(index, {}).items():
            if saved.numel() == bucket.ends[-1]:
                bucket.kept.setdefault(name, np.zeros(saved.numel(), np.float32))[:] = saved.numpy()


def _arrays(bucket: BucketState) -> dict[str, np.ndarray[Any, Any]]:
    """By the transport's own names."""
    return {name: kept for name, kept in bucket.kept.items() if isinstance(kept, np.ndarray)}
