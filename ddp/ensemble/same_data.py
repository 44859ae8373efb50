"""Are members made for the same data? Compared by size and by a hash of examples, as their own tasks give them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.training.data import fetcher
from ddp.training.plan import Plan, size_of
from ddp.training.random_state import preserved_random_state, seed_rank

COMPARED = 256  # examples of each validation set, evenly spread


def check_same_data(plans: Sequence[tuple[str, Plan]]) -> None:
    """Refuse networks, each with a name to be shown, that are not validated on the same examples by the same metrics.

    Raises:
        UsageError: it names two that differ, and how.
    """
    name, first = plans[0]
    for other, each in plans[1:]:
        if each is first:
            continue
        if dict(each.task.goals) != dict(first.task.goals):
            metrics = f"{', '.join(first.task.goals)} and {', '.join(each.task.goals)}"
            raise UsageError(f"ensemble: {name} and {other} are of different tasks: metrics {metrics}")
        if difference := _difference(first.splits.validation, each.splits.validation):
            raise UsageError(f"ensemble: {name} and {other} were not made for the same data: {difference}")


def _difference(one: Dataset[Any], other: Dataset[Any]) -> str:
    sizes = size_of(one), size_of(other)
    if sizes[0] != sizes[1]:
        return f"{sizes[0]:,} and {sizes[1]:,} validation examples"
    return "" if fingerprint(one) == fingerprint(other) else "their validation examples differ"


def fingerprint(dataset: Dataset[Any]) -> str:
    """SHA-256 of up to 256 examples; what the data set draws at random is drawn alike each time."""
    size = size_of(dataset)
    indices = sorted({int(each) for each in np.linspace(0, size - 1, min(size, COMPARED))})
    digest = hashlib.sha256()
    with preserved_random_state():
        seed_rank(0, 0)
        _add(digest, fetcher(dataset)(indices))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _add(digest, value[key])
    elif isinstance(value, tuple | list):
        for each in value:
            _add(digest, each)
    else:
        digest.update(repr(value).encode())
