"""The class of each training example, for sampling that needs it: where users keep labels, looked up in that order.

The task's method `labels(dataset)`; the data set's `labels` or `targets`; a column "labels" or "label" of a column-oriented
one; the last of the tensors of `TensorExamples`. A `Subset` takes its data set's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Subset

from ddp.errors import UsageError
from ddp.tasks.base import Task, TensorExamples

_REMEDY = "give the task a method labels(dataset), or the data set an attribute labels: one integer an example"


def labels_of(task: Task, dataset: Dataset[Any], examples: int) -> NDArray[np.int64]:
    """The label of each example, shape (examples,); of at least two classes.

    Raises:
        UsageError: there are none, or they are not one integer an example, or all the same.
    """
    method = getattr(task, "labels", None)
    found = method(dataset) if callable(method) else _kept(dataset)
    if found is None:
        raise UsageError(f'sampling.name = "class_balanced" needs labels and finds none: {_REMEDY}')
    values = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    if values.dtype.kind not in "iub" or values.shape != (examples,):
        raise UsageError(
            f'sampling.name = "class_balanced": the labels are {values.dtype} of the shape {values.shape}, not {examples} '
            f"integers: {_REMEDY}"
        )
    if values.min() == values.max():
        raise UsageError(
            f'sampling.name = "class_balanced": all examples have the label {values[0]}: nothing to balance'
        )
    return values.astype(np.int64)


def _kept(dataset: Any) -> Any:
    for name in ("labels", "targets"):
        if (values := getattr(dataset, name, None)) is not None and not callable(values):
            return values
    for name in ("labels", "label"):
        if name in (getattr(dataset, "column_names", None) or ()):
            return dataset[name]
    if isinstance(dataset, TensorExamples):
        return dataset.tensors[-1]
    if isinstance(dataset, Subset) and (whole := _kept(dataset.dataset)) is not None:
        values = whole if isinstance(whole, torch.Tensor) else np.asarray(whole)
        return values[list(dataset.indices)]
    return None
