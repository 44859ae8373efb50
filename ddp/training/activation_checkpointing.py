"""Activations that are computed again in backward instead of kept: memory for time, by torch's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddp.training.patterns import matches, require_matches
from ddp.training.sharpness import still_statistics


def checkpoint_activations(module: nn.Module, patterns: Sequence[str], *, compiled: bool = False) -> list[str]:
    """Have the modules whose names match one of `patterns` compute their activations again in backward; their names.

    Names of parameters stay as they are. Of modules inside each other the outer one counts. In a model that is to be
    `compiled` they stay as they are written: torch's compiler takes no checkpoint that has contexts of its own.

    Raises:
        UsageError: a pattern that matches nothing.
    """
    names = {name: each for name, each in module.named_modules() if name}
    require_matches(patterns, list(names), "precision.activation_checkpointing")
    chosen = [name for name in names if matches(name, patterns)]
    outer = [name for name in chosen if not any(name.startswith(f"{each}.") for each in chosen)]
    for name in outer:
        names[name].__class__ = _computing_again(type(names[name]), compiled)
    return outer


def _computing_again(kind: type[nn.Module], compiled: bool) -> type[nn.Module]:
    """The same class, whose forward keeps no activations: a class and no wrapper, so that names stay and copies are whole."""

    class ComputingAgain(kind):  # type: ignore[misc, valid-type]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*inputs, **named)

            def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
                return nullcontext(), still_statistics(self)  # the second time they stay as the first has left them

            return checkpoint(super().forward, *inputs, use_reentrant=False, context_fn=contexts, **named)

    if compiled:  # asked first, since it loads the compiler
        ComputingAgain.forward = torch.compiler.disable(ComputingAgain.forward)  # type: ignore[method-assign]
    ComputingAgain.__name__, ComputingAgain.__qualname__ = kind.__name__, kind.__qualname__
    return ComputingAgain
