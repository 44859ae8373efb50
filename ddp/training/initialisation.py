"""What the weights are before the first step: drawn anew, taken from a file; and which of them are frozen.

Every rank does the same from the same seed and the same file, so that no rank waits for another and a model without
ranks is made the same way; where files differ between nodes, DDP's own broadcast makes all ranks' weights rank 0's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ddp.checkpoint.weights_file import WeightsFile
from ddp.errors import CheckpointError, UsageError
from ddp.job import InitialisationSection
from ddp.training.patterns import matches, require_matches, shown

FIELD = "initialisation"
LEAKY_SLOPE = 0.01  # of torch's LeakyReLU


def initialise_(module: nn.Module, section: InitialisationSection, seed: int) -> None:
    """Draw the weights that the section asks for, and freeze what it names.

    Raises:
        UsageError: a pattern names nothing, or there is no layer to initialise.
    """
    if section.weights != "default":
        draw_weights_(module, section, torch.Generator().manual_seed(seed))
    freeze_(module, section.freeze)


def draw_weights_(module: nn.Module, section: InitialisationSection, generator: torch.Generator) -> None:
    """Weights of linear and convolution layers by torch.nn.init, in the order of `module.modules()`; their biases 0.

    Xavier (Glorot and Bengio 2010, equations 12 and 16), Kaiming (He et al. 2015, arXiv:1502.01852, fan-in) and orthogonal
    (Saxe et al. 2014, arXiv:1312.6120), each with the gain of `activation` (torch.nn.init.calculate_gain).
    A weight that several layers share is drawn by the first; embeddings and normalisation layers stay as they are.

    Raises:
        UsageError: there is no such layer.
    """
    layers = [each for each in module.modules() if isinstance(each, nn.Linear | _ConvNd)]
    weights = dict.fromkeys(weight for each in layers if (weight := each._parameters.get("weight")) is not None)
    if not weights:
        raise UsageError(f"{FIELD}.weights: the model has no linear or convolution layer whose weight could be drawn")
    draw = _draw(section)
    with torch.no_grad():
        for weight in weights:
            drawn = torch.empty(
                weight.shape, dtype=weight.dtype
            )  # the model may be on another device than the generator
            draw(drawn, generator)
            weight.copy_(drawn)
        if section.biases == "zero":
            for each in layers:
                if (bias := each._parameters.get("bias")) is not None:
                    bias.zero_()


def load_weights_(module: nn.Module, section: InitialisationSection) -> int:
    """Take tensors from the section's file; returns how many.

    What is taken are the tensors of `module.state_dict()` that `only` names and `skip` does not. Each must be in the file in
    its shape, and the file must have no other of such a name. Numbers are converted to the model's dtype.

    Raises:
        UsageError: the file cannot be read, or it does not fit; one message names all that is missing, unexpected or of
            another shape.
    """
    if section.file is None:
        return 0
    path = Path(section.file)
    try:
        with WeightsFile(path) as file:
            return _take_from(file, path, module, section)
    except CheckpointError as fault:
        raise UsageError(f"{FIELD}.file: {fault}") from None


def freeze_(module: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters that a pattern names take no gradient; normalisation layers of which all is named stay in evaluation mode.

    To be called again where modules were put in others' places.

    Raises:
        UsageError: a pattern names no parameter.
    """
    if not patterns:
        return
    parameters = dict(module.named_parameters(remove_duplicate=False))  # either name of one that is tied
    require_matches(patterns, list(parameters), f"{FIELD}.freeze")
    for name, parameter in parameters.items():
        if matches(name, patterns):
            parameter.requires_grad_(False)
    for prefix, layer in module.named_modules():
        if isinstance(layer, _NormBase) and _is_frozen(prefix, layer, patterns):
            layer.eval()
            if not stays_in_evaluation(layer):
                layer.register_forward_pre_hook(_stay_in_evaluation)


def stays_in_evaluation(layer: nn.Module) -> bool:
    """Whether `freeze_` has found all of it named."""
    return _stay_in_evaluation in layer._forward_pre_hooks.values()


def _is_frozen(prefix: str, layer: nn.Module, patterns: Sequence[str]) -> bool:
    own = [name for name, _ in layer.named_parameters()] or [name for name, _ in layer.named_buffers()]
    return bool(own) and all(matches(f"{prefix}.{name}" if prefix else name, patterns) for name in own)


def _stay_in_evaluation(layer: nn.Module, *_: Any) -> None:
    """Whoever calls `train()` on the whole model does not mean this one. A function of a module survives deepcopy."""
    if layer.training:  # asked first for the sake of compiled code, which then has nothing to put back
        layer.training = False


def _draw(section: InitialisationSection) -> Callable[[Tensor, torch.Generator], object]:
    activation = section.activation
    slope = LEAKY_SLOPE if activation == "leaky_relu" else 0.0
    gain = init.calculate_gain(activation, slope)
    match section.weights:
        case "xavier_uniform":
            return lambda weight, generator: init.xavier_uniform_(weight, gain, generator)
        case "xavier_normal":
            return lambda weight, generator: init.xavier_normal_(weight, gain, generator)
        case "kaiming_uniform":
            return lambda weight, generator: init.kaiming_uniform_(weight, slope, "fan_in", activation, generator)
        case "kaiming_normal":
            return lambda weight, generator: init.kaiming_normal_(weight, slope, "fan_in", activation, generator)
        case _:
            return lambda weight, generator: init.orthogonal_(weight, gain, generator)


def _take_from(file: WeightsFile, path: Path, module: nn.Module, section: InitialisationSection) -> int:
    state = {name: each for name, each in module.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    for key, patterns in (("only", section.only), ("skip", section.skip)):
        require_matches(patterns, list(dict.fromkeys([*state, *file.shapes])), f"{FIELD}.{key}")
    wanted = {name: tensor for name, tensor in state.items() if _is_asked_for(name, section)}
    shapes = {name: shape for name, shape in file.shapes.items() if _is_asked_for(name, section)}
    _check(path, wanted, shapes)
    taken = [name for name in wanted if name in shapes]
    tensors = {name: file.tensor(name) for name in taken}
    if broken := [name for name in taken if not _is_usable(tensors[name], state[name])]:
        raise UsageError(
            f"{FIELD}.file: {path} has numbers that are not finite, or of another kind, in {shown(broken)}"
        )
    with torch.no_grad():
        for name in taken:
            state[name].copy_(tensors[name])
    return len(taken)


def _is_asked_for(name: str, section: InitialisationSection) -> bool:
    return (not section.only or matches(name, section.only)) and not matches(name, section.skip)


def _check(path: Path, wanted: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """All that does not fit in one message. Of tensors that are tied in the model one name in the file is enough."""
    held = {id(tensor) for name, tensor in wanted.items() if name in shapes}
    missing = [name for name, tensor in wanted.items() if name not in shapes and id(tensor) not in held]
    unexpected = [name for name in shapes if name not in wanted]
    other = [
        f"{name} {shapes[name]}, here {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    if faults := [f"{what}: {shown(names)}" for what, names in found.items() if names]:
        raise UsageError(
            f"{FIELD}.file: {path} does not fit the model; {'; '.join(faults)}. Leave tensors out with {FIELD}.skip = "
            f'["{_first_part([*missing, *unexpected, *other])}*"], or name those to take in {FIELD}.only'
        )
    if not wanted:
        raise UsageError(f"{FIELD}: only and skip leave nothing to take from {path}")


def _first_part(names: Sequence[str]) -> str:
    before, dot, _ = names[0].partition(" ")[0].rpartition(".")
    return f"{before}." if dot else names[0].partition(" ")[0]


def _is_usable(tensor: Tensor, target: Tensor) -> bool:
    if tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex() != target.is_complex():
        return False
    narrow = tensor.is_floating_point() and tensor.element_size() == 1  # of which torch knows too little
    return not isinstance(target, nn.Parameter) or bool((tensor.float() if narrow else tensor).isfinite().all())
