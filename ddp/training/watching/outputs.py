"""What layers put out in a watched step, by forward hooks that are there in that step only.

A place is a module with parameters of its own, or an activation function. Activation functions are often one module called
in many places, so each of its calls in a forward is a place of its own; what a layer with parameters puts out in
several calls is counted together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddp.training.watching.counts import ValueCounts
from ddp.training.watching.weights import ROOT

MOST_CALLS = 8  # of one activation function in a forward that are told apart; later ones are not watched
NEAR = 0.03  # of the range: so near its limit a saturating function is flat
CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)  # channels come second

Lively = Callable[[Tensor], Tensor]


def _between(low: float, high: float) -> Lively:
    margin = NEAR * (high - low)
    return lambda output: (output > low + margin) & (output < high - margin)


def _not_zero(output: Tensor) -> Tensor:
    return output != 0


RECTIFIERS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Threshold)
LIMITS: Mapping[type[nn.Module], tuple[float, float]] = {
    nn.Tanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
}
OTHER_FUNCTIONS = (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.PReLU, nn.Softplus, nn.GLU)


def lively_outputs(module: nn.Module) -> Lively | None:
    """Which outputs of an activation function pass a gradient on; None for a module that has no dead or flat part."""
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return _between(module.min_val, module.max_val)
    if isinstance(module, RECTIFIERS):
        return _not_zero
    limits = LIMITS.get(type(module))
    return None if limits is None else _between(*limits)


def saturates(module: nn.Module) -> bool:
    """Whether an output that is not lively is near a limit, not dead."""
    return lively_outputs(module) is not None and not isinstance(module, RECTIFIERS)


@dataclass(slots=True)
class Place:
    """One place, and what this rank saw of it in the step under way.

    Attributes:
        lively: outputs of each unit that pass a gradient on, shape (units,) int64; None where they are not counted.
        unit_outputs: outputs of each unit.
        examples: whose outputs they are.
    """

    name: str
    module: nn.Module
    has_parameters: bool
    values: int = 0
    total: Tensor | None = None
    squares: Tensor | None = None
    lively: Tensor | None = None
    unit_outputs: int = 0
    examples: int = 0
    comparable: bool = True  # all its outputs had the same number of units

    def clear(self) -> None:
        self.values = self.unit_outputs = self.examples = 0
        self.total = self.squares = self.lively = None
        self.comparable = True


class LayerOutputs:
    """Hooks on a model's places; `start` puts them there, `stop` takes them away."""

    def __init__(self, module: nn.Module, bins_per_octave: int) -> None:
        self._root, self._bins_per_octave = module, bins_per_octave
        self.places: list[Place] = []
        self._first: dict[nn.Module, int] = {}  # of the module's places
        for name, each in module.named_modules():
            own, function = _has_parameters(each), _is_function(each)
            if own or function:
                self._first[each] = len(self.places)
                names = [name or ROOT]
                if function and not own:
                    names += [f"{names[0]} (call {call})" for call in range(2, MOST_CALLS + 1)]
                self.places += [Place(each_name, each, own) for each_name in names]
        self._inputs = [] if any(map(_is_rectifier, self._first)) else self._functional_places()
        self._handles: list[RemovableHandle] = []
        self._calls: dict[nn.Module, int] = {}
        self._channels_second = False
        self._counts: ValueCounts | None = None
        self.order: list[int] = []  # of places, as they were first called in the step
        self.seconds = 0.0  # spent in hooks

    def _functional_places(self) -> list[int]:
        """Where the model has no ReLU module it may call the function: then what goes into layers is looked at, too."""
        layers = [module for module in self._first if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
        start, names = len(self.places), {place.module: place.name for place in reversed(self.places)}
        self.places += [Place(f"input of {names[layer]}", layer, has_parameters=False) for layer in layers]
        return list(range(start, len(self.places)))

    def start(self, device: torch.device) -> None:
        """Before the step's first forward."""
        for place in self.places:
            place.clear()
        self._counts = ValueCounts(len(self.places), self._bins_per_octave, device)
        self.order, self.seconds = [], 0.0
        self._handles = [self._root.register_forward_pre_hook(self._begin_forward)]
        self._handles += [module.register_forward_hook(self._called) for module in self._first]
        for index in self._inputs:
            hook = partial(self._fed, index)
            self._handles.append(self.places[index].module.register_forward_pre_hook(hook))

    def stop(self) -> None:
        """After the step's last backward; safe to call at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, _memo: dict[int, Any]) -> LayerOutputs:
        """A model that is copied for an evaluation while hooks are on it, after a step that was passed over, keeps them."""
        return self

    @property
    def any_called(self) -> bool:
        return bool(self.order)

    def units(self) -> list[int]:
        """Of each place, as this rank saw it in this step; 0 where they are not counted."""
        return [len(each.lively) if each.lively is not None and each.comparable else 0 for each in self.places]

    def sums(self, units: list[int], device: torch.device) -> list[Tensor]:
        """Parts of the vector to be summed over ranks, float64, and drops them here.

        In the order that `ddp.watching.look` reads.

        Args:
            units: of each place, as all ranks have agreed; a place that had others this time has zeros.
        """
        assert self._counts is not None
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        seen = self.units()
        parts: list[Tensor] = []
        for place, agreed, here in zip(self.places, units, seen, strict=True):
            outputs, examples = (place.unit_outputs, place.examples) if agreed == here else (0, 0)
            parts.append(torch.tensor([place.values, outputs, examples], dtype=torch.float64, device=device))
            parts += [zero if each is None else each.reshape(1) for each in (place.total, place.squares)]
        parts.append(self._counts.binned().view(-1))
        for place, agreed, here in zip(self.places, units, seen, strict=True):
            if agreed:
                kept = place.lively is not None and agreed == here
                parts.append(place.lively.double() if kept else zero.expand(agreed))  # type: ignore[union-attr]
        self._counts = None
        return parts

    def _begin_forward(self, _module: nn.Module, _inputs: Any) -> None:
        self._calls = {}
        self._channels_second = False

    def _called(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        began = time.perf_counter()
        index = self._first.get(module)
        if index is None or _inside_backward():  # a copy; a checkpointed part, which computes again what was counted
            return
        place = self.places[index]
        if not place.has_parameters:
            call = self._calls[module] = self._calls.get(module, 0) + 1
            if call > MOST_CALLS:
                return
            place = self.places[index := index + call - 1]
        elif isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.LayerNorm, nn.Embedding)):
            self._channels_second = isinstance(module, CONVOLUTIONS)
        self._take(index, place, lively_outputs(module), output)
        self.seconds += time.perf_counter() - began

    def _fed(self, index: int, _module: nn.Module, inputs: Any) -> None:
        """Only what looks like a rectifier's output counts: nowhere below zero, and made by the model."""
        began = time.perf_counter()
        values = _first_tensor(inputs)
        if values is None or not values.requires_grad or _inside_backward():
            return
        if not bool((values < 0).any()):
            self._take(index, self.places[index], _not_zero, values)
        self.seconds += time.perf_counter() - began

    def _take(self, index: int, place: Place, lively: Lively | None, output: Any) -> None:
        values = _first_tensor(output)
        if values is None or not values.numel() or self._counts is None:
            return
        values = values.detach()
        if not place.values:
            self.order.append(index)
        self._counts.add(index, values)
        flat = (values if values.dtype == torch.float64 else values.float()).reshape(-1)
        total, squares = flat.sum().double(), flat.dot(flat).double()
        place.total = total if place.total is None else place.total + total
        place.squares = squares if place.squares is None else place.squares + squares
        place.values += values.numel()
        if lively is not None and values.dim() >= 2:
            self._count_units(place, lively(values))

    def _count_units(self, place: Place, lively: Tensor) -> None:
        dimension = 1 if self._channels_second or lively.dim() == 2 else lively.dim() - 1
        others = [each for each in range(lively.dim()) if each != dimension]
        counts = lively.count_nonzero(dim=others)
        if place.lively is not None and len(place.lively) != len(counts):
            place.comparable = False
            return
        place.lively = counts if place.lively is None else place.lively + counts
        place.unit_outputs += lively.numel() // len(counts)
        place.examples += len(lively)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _is_rectifier(module: nn.Module) -> bool:
    return isinstance(module, RECTIFIERS)


def _is_function(module: nn.Module) -> bool:
    return lively_outputs(module) is not None or isinstance(module, OTHER_FUNCTIONS)


def _first_tensor(output: Any) -> Tensor | None:
    """The first floating tensor of what a module takes or gives: attention gives its weights beside it."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.layout == torch.strided else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for each in parts if (found := _first_tensor(each)) is not None), None)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def is_compiled(model: nn.Module) -> bool:
    """Whether hooks on its modules are passed over, or would become a part of what is compiled."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
