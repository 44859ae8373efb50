"""What goes into a model and comes out of it while its task computes a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ddp.tasks.base import Batch, Task


@dataclass
class Call:
    """One call of the model: its tensors in, its tensors out, and the losses (examples,) that followed."""

    losses: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def observe_call(task: Task, model: nn.Module, batch: Batch) -> Call:
    """Compute the losses of `batch`; of several calls of the model the first one's inputs and the last one's outputs."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not inputs:
            inputs.extend(tensors_in((args, kwargs)))
        outputs[:] = tensors_in(result)

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        losses = task.loss(model, batch)
    finally:
        handle.remove()
    return Call(losses, inputs, outputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a nest of tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
