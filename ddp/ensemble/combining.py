"""The mean of several networks' predictions, as one network that any task can evaluate.

A task that tells classes apart says along which dimension of its model's outputs the classes lie (`class_dimension`). The
ensemble then answers with the log of the mean of the probabilities, which is a vector of logits like any member's:
its softmax is that mean, so that the task's own loss and metrics of it are the ensemble's. Outputs of other tasks, such as
regression, are averaged as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddp.errors import UsageError
from ddp.job import PrecisionSection
from ddp.tasks.base import ClassDimension
from ddp.training.precision import DTYPES

LOGITS = "logits"  # of outputs that are several


def log_mean_probabilities(
    logits: Sequence[Tensor], weights: Sequence[float], dimension: int | Literal["binary"], temperature: float = 1.0
) -> Tensor:
    """log sum_k w_k softmax(z_k / T): normalised logits of the members' shape, float32 at least.

    "binary": the logit of sum_k w_k sigmoid(z_k / T).
    """
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) / temperature for each in logits]
    if dimension == "binary":
        yes = _log_of_mean([functional.logsigmoid(each) for each in wide], weights)
        return yes - _log_of_mean([functional.logsigmoid(-each) for each in wide], weights)
    return _log_of_mean([torch.log_softmax(each, dim=dimension) for each in wide], weights)


def _log_of_mean(logs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log sum_k w_k exp(x_k), without overflow."""
    terms = [each + (math.log(weight) if weight else -math.inf) for each, weight in zip(logs, weights, strict=True)]
    return functools.reduce(torch.logaddexp, terms)


def combine(
    outputs: Sequence[Any], weights: Sequence[float], dimension: ClassDimension, temperature: float = 1.0
) -> Any:
    """Of tensors, or of mappings or dataclasses of tensors, whose "logits" are then what has classes.

    Raises:
        UsageError: the members answer with different shapes, with something else, or with no logits where there are classes.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        if any(not isinstance(each, Tensor) or each.shape != first.shape for each in outputs):
            raise UsageError(f"ensemble: members answer one batch with different shapes: {_shapes(outputs)}")
        if dimension is not None:
            return log_mean_probabilities(outputs, weights, dimension, temperature)
        if not first.is_floating_point():
            return first
        return sum(weight * each for weight, each in zip(weights, outputs, strict=True))
    if isinstance(first, Mapping) or dataclasses.is_dataclass(first):
        return _combine_parts(outputs, weights, dimension, temperature)
    raise UsageError(
        f"ensemble: a model answers with a {type(first).__name__}; a tensor, a mapping or a dataclass of tensors is needed"
    )


def _combine_parts(
    outputs: Sequence[Any], weights: Sequence[float], dimension: ClassDimension, temperature: float
) -> Any:
    """A copy of the first, with every tensor in it replaced."""
    first = outputs[0]
    if dimension is not None and not (LOGITS in first if isinstance(first, Mapping) else hasattr(first, LOGITS)):
        raise UsageError(
            f"ensemble: the task has a class_dimension, and its model's {type(first).__name__} has no {LOGITS}: probabilities of "
            "what? Name them so, or leave class_dimension out"
        )

    def combined(name: str, value: Any) -> Any:
        values = [each[name] if isinstance(each, Mapping) else getattr(each, name) for each in outputs]
        own = dimension if name == LOGITS else None
        return combine(values, weights, own, temperature) if isinstance(value, Tensor) else value

    return _with_parts(first, combined)


def _with_parts(output: Any, changed: Callable[[str, Any], Any]) -> Any:
    """A copy of a mapping or a dataclass, which may be frozen, with each part as `changed` has it."""
    if isinstance(output, Mapping):
        copied: Any = copy.copy(output)
        for name, value in output.items():
            copied[name] = changed(name, value)
        return copied
    names = [each.name for each in dataclasses.fields(output) if each.init]
    return dataclasses.replace(output, **{name: changed(name, getattr(output, name)) for name in names})


def _shapes(outputs: Sequence[Any]) -> str:
    return ", ".join(str(tuple(each.shape)) if isinstance(each, Tensor) else type(each).__name__ for each in outputs)


class Member(nn.Module):
    """A network in the precision of its own job, whatever the caller's; on request it does not compute the same twice."""

    def __init__(self, module: nn.Module, precision: PrecisionSection | None = None) -> None:
        super().__init__()
        self.module = module
        self._dtype = DTYPES["float32" if precision is None else precision.dtype]
        self._remembered: list[tuple[tuple[Any, ...], dict[str, Any], Any]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for before, named_before, output in self._remembered or ():
            if _same(before, args) and _same(named_before, kwargs):
                return output
        device = next((each.device.type for each in self.module.parameters()), "cpu")
        lower = self._dtype != torch.float32
        with torch.autocast(device, self._dtype if lower else None, enabled=lower):
            output = self.module(*args, **kwargs)
        output = _widened(output) if lower else output
        if self._remembered is not None:
            self._remembered.append((args, kwargs, output))
        return output


def _widened(output: Any) -> Any:
    """In float32, as autocast has it for the losses that follow; means of narrow numbers would round, too."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, Mapping) or (dataclasses.is_dataclass(output) and not isinstance(output, type)):
        return _with_parts(output, lambda _, value: _widened(value))
    return output


class Ensemble(nn.Module):
    """The weighted mean of its members' predictions, see `combine`; on CPU or device, as they are."""

    def __init__(
        self,
        members: Sequence[Member],
        weights: Sequence[float],
        class_dimension: ClassDimension,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        self.class_dimension: ClassDimension = class_dimension
        self.temperature = temperature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [member(*args, **kwargs) for member in self.members]
        return combine(outputs, self.weights, self.class_dimension, self.temperature)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While one batch is looked at again and again: each member computes once for the same inputs."""
        members = [member for member in self.members if isinstance(member, Member)]
        for member in members:
            member._remembered = []
        try:
            yield
        finally:
            for member in members:
                member._remembered = None


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs are equal in every bit."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return type(one) is type(other) and isinstance(one, int | float | str | bool) and one == other
