"""What is checked on one rank: the job with and without its regularisation, its model before and after a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ddp.job import Job
from ddp.tasks.base import Batch, Task
from ddp.training.data import fetcher, to_device
from ddp.training.random_state import preserved_random_state, seed_rank

EXAMPLES_SEED = 3  # beside the job's: which examples are looked at


@dataclass(frozen=True)
class Subject:
    """On one rank; nothing in it is changed by a check, which takes copies.

    Attributes:
        task, plain_task: as the job has it, and without its regularisation; the same where it has none.
        initial, model: the model as the run begins, and after a few steps of training.
        training: the training set without augmentation, or the beginning of a stream.
        decay: weight decay of each parameter that has some, by name.
        asked_to_stop: whether a signal came to this rank: long checks then end early.
        seconds: that each of the long checks may take, about.
    """

    job: Job
    plain_job: Job
    task: Task
    plain_task: Task
    initial: nn.Module
    model: nn.Module
    training: Dataset[Any]
    decay: Mapping[str, float]
    device: torch.device
    rank: int = 0
    world_size: int = 1
    asked_to_stop: Callable[[], bool] = lambda: False
    seconds: float = 60.0

    def patience(self) -> Callable[[], bool]:
        """Whether it is time to end: a signal came, or `seconds` have passed since this call."""
        until = time.monotonic() + self.seconds
        return lambda: self.asked_to_stop() or time.monotonic() > until

    @property
    def size(self) -> int:
        """Examples of the training set."""
        return len(self.training)  # type: ignore[arg-type]

    def examples(self, count: int) -> list[int]:
        """Indices of so many training examples, or of all: others on each rank as far as there are enough."""
        order = np.random.default_rng((self.job.run.seed, EXAMPLES_SEED)).permutation(self.size)
        return np.roll(order, -self.rank * count)[:count].tolist()

    def fetch(self, indices: Sequence[int]) -> Batch:
        """A batch on the device; what its data set draws is the same each time and on every rank."""
        with preserved_random_state():
            seed_rank(self.job.run.seed, 0)
            return to_device(fetcher(self.training)(indices), self.device)
