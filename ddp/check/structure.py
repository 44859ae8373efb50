"""What is seen in one call of the model: inputs that are standardised, and outputs that no BatchNorm has made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddp.check.determinism import without_dropout
from ddp.check.observing import observe_call, tensors_in
from ddp.check.subject import Subject
from ddp.check.verdicts import Verdict, several
from ddp.training.random_state import preserved_random_state, seed_rank

INPUTS, OUTPUT = "standardised inputs", "no BatchNorm on the output"
LOOKED_AT = 128  # examples of a rank
CENTRED = 0.3  # mean over standard deviation
SCALES = (0.3, 3.0)  # of a standardised input's standard deviation
UNEQUAL = 10.0  # root mean square of one channel over that of all
# Nodes of autograd that move values, average over positions or squash: behind them a BatchNorm is still the last layer.
TRANSPARENT = (
    *(
        "View",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "TBackward",
        "Permute",
        "Slice",
        "Select",
        "Clone",
        "Alias",
    ),
    *("Expand", "Contiguous", "Softmax", "Sigmoid", "Tanh", "ToCopy", "AsStrided", "Unbind", "Split", "Mean"),
)


def check_inputs(subject: Subject) -> Verdict:
    """Mean and standard deviation of the floating-point tensors that the model is given."""
    inputs, whole = _inputs(subject)
    if not inputs:
        kinds = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in whole})) or "no tensor"
        found = f"the model is given {kinds}: nothing to standardise"
        advice = (
            "indices of an embedding need nothing; bytes that the model turns into numbers should be standardised there"
        )
        return Verdict(INPUTS, "skipped", found, advice)
    faults, seen, figures = [], [], []
    for number, tensor in enumerate(inputs):
        name = f"input {number}" if len(inputs) > 1 else "inputs"
        fault, text, numbers = _judge_input(tensor)
        seen.append(f"{name} {text}")
        figures.append(numbers)
        faults += [f"{name}: {fault}"] if fault else []
    if any(not torch.isfinite(tensor).all() for tensor in inputs):
        found = f"values that are not finite; {', '.join(seen)}"
        return Verdict(
            INPUTS, "failed", found, "find the examples and leave them out, or mend them", {"inputs": figures}
        )
    if faults:
        found = f"{'; '.join(faults)} ({', '.join(seen)})"
        return Verdict(INPUTS, "warning", found, _ADVICE_INPUTS, {"inputs": figures})
    return Verdict(INPUTS, "ok", ", ".join(seen), "", {"inputs": figures})


_ADVICE_INPUTS = (
    "subtract the training set's mean and divide by its standard deviation, the same numbers for the validation set"
)


def check_output(subject: Subject) -> Verdict:
    """Whether what the model returns comes out of a BatchNorm, through nothing but reshaping or a squashing function."""
    model = without_dropout(subject.initial)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not norms:
        return Verdict(OUTPUT, "ok", "the model has no BatchNorm")
    made: dict[object, str] = {}
    handles = [module.register_forward_hook(_Noting(made, name)) for name, module in norms.items()]
    try:
        with preserved_random_state():
            seed_rank(subject.job.run.seed, subject.rank)
            call = observe_call(subject.plain_task, model, subject.fetch(subject.examples(4)))
    finally:
        for handle in handles:
            handle.remove()
    last = sorted({made[node] for output in call.outputs for node in _origins(output) if node in made})
    if last:
        found = f"the outputs come from {several(last)}, a BatchNorm"
        advice = (
            "leave it out: each prediction would depend on the other examples of its batch, and outputs could not be larger "
            "than the batch allows"
        )
        return Verdict(OUTPUT, "failed", found, advice, {"modules": last})
    return Verdict(OUTPUT, "ok", f"none of {len(norms)} is the last layer")


class _Noting:
    """A forward hook that notes which node of autograd a module's output comes from."""

    def __init__(self, made: dict[object, str], name: str) -> None:
        self._made, self._name = made, name

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self._made[tensor.grad_fn] = self._name


def _origins(output: Tensor) -> list[object]:
    """The nodes that an output comes from, up to the first that is not transparent and with it."""
    seen: list[object] = []
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.append(node)
        if any(name in node.name() for name in TRANSPARENT):
            waiting += [before for before, _ in node.next_functions]
    return seen


def _inputs(subject: Subject) -> tuple[list[Tensor], list[Tensor]]:
    """The model's floating-point tensors with a dimension of examples, and all its tensors; from the plain task."""
    model = without_dropout(subject.initial)
    indices = subject.examples(LOOKED_AT)
    with preserved_random_state(), torch.no_grad():
        seed_rank(subject.job.run.seed, subject.rank)
        call = observe_call(subject.plain_task, model, subject.fetch(indices))
    inputs = [each.double() for each in call.inputs if each.is_floating_point() and each.dim() and each.numel()]
    return inputs, call.inputs


def _judge_input(values: Tensor) -> tuple[str, str, dict[str, float]]:
    """What is wrong, if anything; what was seen, in words and as numbers."""
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    low, high = float(values.min()), float(values.max())
    text = f"mean {mean:.3g}, standard deviation {deviation:.3g}, from {low:.3g} to {high:.3g}"
    figures = {"mean": mean, "deviation": deviation, "smallest": low, "largest": high}
    if deviation == 0:
        return "all values are the same", text, figures
    faults = []
    if abs(mean) > CENTRED * deviation:
        faults.append("not centred")
    if not SCALES[0] <= deviation <= SCALES[1]:
        faults.append("not scaled")
    if values.dim() > 1 and (odd := _odd_channels(values)):
        faults.append(f"channel {several([str(each) for each in odd])} much larger than the others")
    return ", ".join(faults), text, figures


def _odd_channels(values: Tensor) -> list[int]:
    """Places along axis 1 whose values are far larger than those of the typical one."""
    sizes = values.transpose(0, 1).flatten(1).square().mean(dim=1).sqrt()
    typical = float(sizes[sizes > 0].median()) if bool((sizes > 0).any()) else 0.0
    return [int(each) for each in (sizes > UNEQUAL * typical).nonzero().flatten()] if typical > 0 else []
