"""A backward that is thrown away, so that all steps of all parts of a run have the same buckets.

DDP reduces its first backward as one bucket and builds its buckets anew after it. Sums of squares depend on the
buckets in their last bits, and through clipping so do weights: a resumed run would differ from one that went on.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp.errors import UsageError
from ddp.training.extra_state import ExtraState
from ddp.training.random_state import preserved_random_state
from ddp.transport.comm_hook import GradientExchange


def settle_buckets(
    model: DistributedDataParallel, exchange: GradientExchange, first_losses: Callable[[], Tensor]
) -> None:
    """Run one backward of the sum of `first_losses()` and leave everything as it was. Collective.

    Raises:
        UsageError: a parameter got no gradient.
    """
    buffers, extra = [buffer.clone() for buffer in model.buffers()], ExtraState(model.module)
    before = extra.state_dict()
    with preserved_random_state():
        first_losses().sum().backward()
    exchange.take()
    exchange.forget_left_over()
    _raise_if_unused(model.module)
    model.zero_grad()
    for buffer, saved in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(saved)
    extra.load_state_dict(before)


def _raise_if_unused(module: nn.Module) -> None:
    """After a first backward: DDP waits for the gradient of every parameter that takes one."""
    unused = [name for name, each in module.named_parameters() if each.requires_grad and each.grad is None]
    if unused:
        rest = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise UsageError(
            f"task: no gradient reaches {', '.join(unused[:3])}{rest} of the model: the loss does not depend on "
            "them; use them in every forward, or freeze them with requires_grad_(False)"
        )
