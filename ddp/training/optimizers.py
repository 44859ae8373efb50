"""torch's optimizers, fused where torch can, over groups of parameters; and clipping that costs no pass of its own.

A fused step reads and writes each parameter once; for 25 M parameters AdamW's default loops take five
times as long on CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ddp.errors import UsageError
from ddp.job import GroupSection, OptimizerSection
from ddp.training.patterns import matches, require_matches

Named = tuple[str, nn.Parameter]


def build_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter] | Iterable[Named]) -> Optimizer:
    """The optimizer of the job's [optimizer] table over the parameters that take a gradient.

    Each of its groups has `learning_rate_factor`, what the run's rate is to be multiplied with for it.

    Args:
        parameters: with their names (`module.named_parameters()`) where the job has groups.

    Raises:
        UsageError: a group has no parameter of its own.
    """
    named = [each if isinstance(each, tuple) else ("", each) for each in parameters]
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = _groups(section, named) if section.groups else [_group([parameter for _, parameter in trained])]
    rate, fused = section.learning_rate, all(_can_be_fused(parameter) for _, parameter in trained)
    for group in groups:
        group["lr"] = rate * group["learning_rate_factor"]
    common: dict[str, Any] = {"lr": rate, "weight_decay": section.weight_decay}
    match section.name:
        case "sgd" | "momentum" | "nesterov":
            return SGD(groups, **common, momentum=section.momentum, nesterov=section.uses_nesterov, fused=fused)
        case "adagrad":
            own = _given(
                lr_decay=section.learning_rate_decay, initial_accumulator_value=section.initial_accumulator_value
            )
            on_cpu = all(parameter.device.type == "cpu" for _, parameter in trained)
            return Adagrad(groups, **common, **own, eps=section.epsilon, fused=fused and on_cpu)
        case "rmsprop":  # torch has neither this nor the next fused
            own = _given(alpha=section.alpha, centered=section.centered)
            return RMSprop(groups, **common, **own, eps=section.epsilon, momentum=section.momentum, foreach=True)
        case "adadelta":
            return Adadelta(groups, **common, **_given(rho=section.rho), eps=section.epsilon, foreach=True)
        case "adam":
            return Adam(groups, **common, betas=section.betas, eps=section.epsilon, fused=fused)
        case "adamw":
            return AdamW(groups, **common, betas=section.betas, eps=section.epsilon, fused=fused)


def moments(section: OptimizerSection) -> int:
    """How many tensors of a parameter's size its optimizer keeps."""
    match section.name:
        case "adam" | "adamw" | "adadelta":
            return 2
        case "rmsprop":
            return 1 + (section.momentum > 0) + bool(section.centered)
        case "adagrad":
            return 1
        case _:
            return int(section.momentum > 0)


def set_rate_(optimizer: Optimizer, rate: float) -> None:
    """Give each group its part of the run's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("learning_rate_factor", 1.0)


def set_momentum_(optimizer: Optimizer, momentum: float) -> None:
    """Set the momentum, or Adam's beta_1, of an optimizer that has one."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif "momentum" in group:
            group["momentum"] = momentum


def weight_decay_penalty(optimizer: Optimizer) -> float:
    """What weight decay adds to the loss: the sum over groups of weight_decay / 2 |w|^2, in the loss's unit.

    Its gradient weight_decay * w is what torch adds to the loss's own (Krogh and Hertz 1991). AdamW's is decoupled
    (Loshchilov and Hutter 2019, arXiv:1711.05101): w falls by rate * weight_decay * w beside the step, so the loss that it
    minimises has no such term. The number is then that of the same formula: the function whose plain gradient the decay
    goes down, to be compared over a run, not a part of what Adam's own step sees. Parameters are alike on all ranks,
    and so is this; one pass over them.
    """
    total = 0.0
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay", 0.0))
        if decay > 0:
            norms = [torch.linalg.vector_norm(each.detach(), dtype=torch.float64) for each in group["params"]]
            total += decay / 2 * float(torch.stack(norms).square().sum()) if norms else 0.0
    return total


def clip_(optimizer: Optimizer, parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale the gradients to `max_norm` where their finite `norm` exceeds it; call once, before each step.

    A fused optimizer divides while it steps, and the gradients are scaled only after that. Otherwise they
    are multiplied here.
    """
    excess = norm > max_norm
    if optimizer.defaults.get("fused"):
        # Read by the fused step: float32 is what its kernels take, for parameters of any dtype.
        optimizer.grad_scale = torch.tensor(norm / max_norm) if excess else None  # type: ignore[attr-defined]
    elif excess:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, max_norm / norm)


def _group(parameters: Sequence[nn.Parameter] | Sequence[Named], factor: float = 1.0) -> dict[str, Any]:
    return {"params": list(parameters), "learning_rate_factor": factor}


def _groups(section: OptimizerSection, named: Sequence[Named]) -> list[dict[str, Any]]:
    """Those of the job, in its order, and one of what is left; torch keeps the names, which tell a resumed run's apart."""
    left = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(section.groups):
        field = f"optimizer.groups.{index}.parameters"
        require_matches(group.parameters, [name for name, _ in named], field)
        mine = [(name, parameter) for name, parameter in left if matches(name, group.parameters)]
        if not mine:
            raise UsageError(f"{field}: all that {', '.join(group.parameters)} names is frozen or in a group before")
        groups.append(_made(group, mine))
        left = [(name, parameter) for name, parameter in left if not matches(name, group.parameters)]
    return [*groups, {**_group(left), "name": "rest"}] if left else groups


def _made(group: GroupSection, members: list[Named]) -> dict[str, Any]:
    made = {**_group(members, group.learning_rate_factor), "name": ", ".join(group.parameters)}
    return made if group.weight_decay is None else {**made, "weight_decay": group.weight_decay}


def _given(**settings: Any) -> dict[str, Any]:
    """Without what the job leaves to torch."""
    return {name: value for name, value in settings.items() if value is not None}


def _can_be_fused(parameter: Tensor) -> bool:
    """Fused kernels walk over memory, so they need it dense: a view with gaps would be written past its elements."""
    dense = torch.empty_like(parameter).stride() == parameter.stride()
    return parameter.device.type in {"cpu", "cuda"} and parameter.is_floating_point() and dense
