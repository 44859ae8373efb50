"""The largest eigenvalue of the Hessian of the loss, by power iteration on products of the Hessian with a vector.

A product is the gradient of g . v (Pearlmutter 1994). Here ranks share out the batches and add up. The iteration meets the
eigenvalue of the largest magnitude; where that is negative, it goes on with the Hessian less that one, whose largest
magnitude is then that of the largest eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddp.landscape.surface import COMMAND, Examples
from ddp.trained import Trained
from ddp.training.agreement import stop_together
from ddp.training.place import Place

ITERATIONS = 60  # at most
CLOSE = 1e-3  # relative change of the eigenvalue at which the iteration ends


def largest_eigenvalue(place: Place, trained: Trained, examples: Examples, seed: int) -> float:
    """Of the mean loss over the examples, in evaluation mode and float32; NaN where it has no second derivative. Collective."""
    found = _power_iteration(place, trained, examples, seed, shift=0.0)
    if not found < 0:
        return found
    return found + _power_iteration(place, trained, examples, seed, shift=found)


def _power_iteration(place: Place, trained: Trained, examples: Examples, seed: int, shift: float) -> float:
    """Of H - shift."""
    parameters = [each for each in trained.module.parameters() if each.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(each.shape, generator=generator).to(each) for each in parameters]
    before = math.nan
    for _ in range(ITERATIONS):
        length = math.sqrt(sum(float(each.double().square().sum()) for each in vector))
        if not (math.isfinite(length) and length > 0):
            return 0.0 if length == 0 else math.nan
        vector = [each / length for each in vector]
        product = hessian_product(place, trained, examples, parameters, vector)
        if product is None:
            return math.nan
        product = [each - shift * own for each, own in zip(product, vector, strict=True)]
        value = sum(float((one.double() * other).sum()) for one, other in zip(product, vector, strict=True))
        if abs(value - before) <= CLOSE * abs(value):
            return value
        before, vector = value, product
    return before


def hessian_product(
    place: Place, trained: Trained, examples: Examples, parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> list[Tensor] | None:
    """H v; None, on all ranks, where the loss cannot be differentiated twice. Collective."""
    rank, world_size = place.topology.rank, place.topology.world_size
    total = torch.zeros(sum(each.numel() for each in parameters) + 1, dtype=torch.float64, device=place.device)
    try:
        for batch in examples.batches[rank::world_size]:
            total[:-1] += _product_of(trained, batch, parameters, vector)
    except RuntimeError:  # torch has no second derivative of some operation
        total[-1] = 1.0
    if world_size > 1:
        dist.all_reduce(total)
    stop_together(place.stop.asked, COMMAND)
    if total[-1] > 0:
        return None
    parts = (total[:-1] / examples.count).split([each.numel() for each in parameters])
    return [part.view_as(each).to(each) for part, each in zip(parts, parameters, strict=True)]


def _product_of(trained: Trained, batch: object, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Tensor:
    """Of the sum of a batch's losses; attention in the form that has second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        loss = trained.plan.task.loss(trained.module, batch).sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        slope = sum((one * other).sum() for one, other in zip(gradients, vector, strict=True))
        if not (isinstance(slope, Tensor) and slope.requires_grad):  # the loss is linear
            return torch.zeros(sum(each.numel() for each in parameters), dtype=torch.float64, device=loss.device)
        products = torch.autograd.grad(slope, parameters, materialize_grads=True)
    return torch.cat([each.double().flatten() for each in products])
