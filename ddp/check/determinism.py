"""A loss that is the same number whenever it is asked for, in double precision, at a copy of the model.

dropout        off: modules of torch's dropout, and the dropout of its attention and recurrent layers
BatchNorm      the batch's own statistics in every call, as in training: running ones would change from call to call
               and the analytic gradient would not see it; they belong to the copy
other draws    all generators are seeded before each call
dtypes         parameters, buffers, examples and whatever the forward makes are float64
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # the one base of all dropout
from torch.overrides import TorchFunctionMode

from ddp.tasks.base import Batch, Task
from ddp.training.data import mapped
from ddp.training.random_state import preserved_random_state, seed_rank

NARROW = {torch.float32, torch.float16, torch.bfloat16}
WITH_DROPOUT = (nn.RNNBase, nn.MultiheadAttention)  # the layers that hold a share themselves


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy in training mode that drops nothing out."""
    result = copy.deepcopy(model)
    result.train()
    for module in result.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, WITH_DROPOUT):
            module.dropout = 0.0
    return result


def to_double(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    return mapped(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


@contextmanager
def double_precision() -> Iterator[None]:
    """What is made without a dtype is float64 meanwhile; generators go on afterwards as if nothing had been drawn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with preserved_random_state():
            yield
    finally:
        torch.set_default_dtype(before)


def seeded_loss(task: Task, model: nn.Module, batch: Batch, seed: int) -> Callable[[], Tensor]:
    """The mean loss over the batch, shape (), with the same draws in every call."""

    def loss() -> Tensor:
        seed_rank(seed, 0)
        return task.loss(model, batch).mean()

    return loss


class PrecisionWatch(TorchFunctionMode):
    """Notes the first function whose result is narrower than float64 and carries a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.narrow and isinstance(result, Tensor) and result.dtype in NARROW and result.requires_grad:
            self.narrow = f"{getattr(function, '__name__', function)} gives {str(result.dtype).removeprefix('torch.')}"
        return result
