"""Batches of column-oriented data sets and of examples that are dictionaries, as tensors with one row an example.

A data set like HuggingFace's `datasets.Dataset` has `column_names` and answers a list of indices with a dictionary of
columns: tensors or arrays where its format says so, else Python lists. torch's `default_collate` would take a row that is a
list apart, and give one tensor a place in the row instead of one row an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ddp.errors import UsageError


def is_column_oriented(dataset: object) -> bool:
    """Whether it answers a list of indices with a dictionary of columns, as `datasets.Dataset` does."""
    return isinstance(getattr(dataset, "column_names", None), Sequence) and hasattr(dataset, "__getitem__")


def collate(examples: Any) -> Any:
    """A batch of a list of examples, or of a dictionary of columns."""
    if isinstance(examples, Mapping):
        columns = cast(Mapping[str, Any], examples)
        return {name: column(name, values) for name, values in columns.items()}
    if examples and all(isinstance(example, Mapping) for example in examples):
        names: list[str] = list(examples[0])
        if any(example.keys() != examples[0].keys() for example in examples):
            raise UsageError(f"task: examples of one batch have different keys; the first has {', '.join(names)}")
        return {name: column(name, [example[name] for example in examples]) for name in names}
    return default_collate(examples)


def column(name: str, values: Any) -> Any:
    """One column: a tensor of a row an example where it holds numbers or tensors, float32 for Python's floats."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return torch.from_numpy(values)
    rows: list[Any] = list(values)
    first = rows[0] if rows else None
    try:
        if isinstance(first, Tensor | np.ndarray):
            return torch.stack([torch.as_tensor(row) for row in rows])
        if isinstance(first, bool | int | float) or (isinstance(first, list) and _holds_numbers(first)):
            return torch.tensor(rows)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"task: the rows of column {name!r} do not make one tensor ({error}): pad them, leave the column out, or give "
            "the data set a function collate"
        ) from None
    if isinstance(first, Mapping):
        return collate(rows)
    return rows if isinstance(first, list | str | bytes) or first is None else default_collate(rows)


def _holds_numbers(row: list[Any]) -> bool:
    while row and isinstance(row[0], list):
        row = cast(list[Any], row[0])
    return not row or isinstance(row[0], bool | int | float)
