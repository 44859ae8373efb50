"""`ddp.attach`: the noise scale of a DDP model, in two lines of somebody's script.

    model = DistributedDataParallel(net)
    meter = ddp.attach(model, batch_size=32)          # examples per rank and backward
    for ...: loss.backward(); optimizer.step(); reading = meter.step(examples=len(x))

What is measured, and when, is in `ddp.metering.gradient_meter`.
"""

import logging
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp.errors import UsageError
from ddp.metering.gradient_meter import GradientMeter as GradientMeter
from ddp.metering.measurement import has_batch_statistics
from ddp.transport.binding import Binding
from ddp.transport.binding import pin as pin_ranks
from ddp.transport.select import control_group, select_transport

logger = logging.getLogger("ddp.metering")


def attach(
    model: DistributedDataParallel,
    batch_size: int,
    transport: str = "auto",
    timeout_seconds: float = 300.0,
    *,
    optimizer: Optimizer | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    population: int | None = None,
    sample_every: Literal["auto"] | int = "auto",
    layers: bool = True,
    wire: str = "gradient",
    overlap: Literal["auto"] | bool = "auto",
    pin: Literal["auto"] | bool = False,
) -> GradientMeter:
    """Average the gradients of `model` and measure their noise scale on the way. Collective over its group.

    Each rank is a unit of the estimate; a script that accumulates gives, in sampled steps, each of its backwards as one. For
    that the model is called, forward and backward, under `model.no_sync()` for all backwards of a step but the last,
    and each backward's loss is divided by their number. One that does not divide gets the same noise scale, with
    |G|^2 and tr(Sigma) larger by the square of that number: gradients alone do not tell which it is.

    A step that is not finite on any rank is left out on all; clipping between backward and the optimizer's step changes
    nothing. Where the gradients are not what they should be, a warning on rank 0 says so once (logger `ddp.metering`).

    Args:
        model: a DistributedDataParallel model without a comm hook, before its first backward.
        batch_size: examples per rank and backward.
        transport: "auto" (shared memory on one node's CPUs, else c10d), or one by its name.
        timeout_seconds: how long a rank may stay away from an exchange before the others give it up.
        optimizer: for Adam and AdamW the noise scale that they see is the headline from their 51st step on, and
            each of several parameter groups has one of its own.
        grad_scaler: that scales the loss; gradients are measured without it.
        population: examples of the training set, where a step's are drawn from it without replacement and nothing
            (augmentation, dropout) makes an example new each time; infinite where left out.
        sample_every: steps from one to the next whose backwards, layers and preconditioned norms are looked at, the same on
            all ranks; "auto": a fiftieth of the steps so far, until that costs half a percent of a step.
        layers: one noise scale a layer, in sampled steps.
        wire: what gradients travel as: "gradient" (as they are), "bfloat16", "float16" or "int8".
        overlap: whether a thread averages while backward goes on; "auto" where there is a core to spare for it.
        pin: whether to keep each rank on cores of its own until the meter is closed; "auto" where there is a
            core for each and nothing has bound them.

    Raises:
        UsageError: not a DDP model, a number that is not positive, a transport that is unknown or
            cannot do what is asked, or a model that has a comm hook already.
    """
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(
            f"ddp.attach takes a torch.nn.parallel.DistributedDataParallel model, not {type(model).__name__}: "
            "wrap it first, model = DistributedDataParallel(model)"
        )
    group = model.process_group
    _check(batch_size, dist.get_world_size(group), population, sample_every)
    device_type = next(model.parameters()).device.type
    binding = pin_ranks(pin, control_group(group)) if pin is not False else Binding()
    try:
        chosen = select_transport(transport, device_type, timeout_seconds, group, wire=wire, overlap=overlap)
        meter = GradientMeter(
            model,
            batch_size,
            chosen,
            binding,
            optimizer=optimizer,
            grad_scaler=grad_scaler,
            population=population,
            sample_every=sample_every,
            layers=layers,
        )
    except BaseException:
        binding.release()
        raise
    if has_batch_statistics(model) and dist.get_rank(group) == 0:
        logger.warning(
            "the model normalises over its batch, so that an example's gradient depends on the others of its batch: the noise "
            "scale is that of batches of this size a rank (with SyncBatchNorm the ranks' gradients depend on each other too)"
        )
    return meter


def _check(batch_size: int, world_size: int, population: int | None, sample_every: Literal["auto"] | int) -> None:
    if batch_size < 1:
        raise UsageError(f"ddp.attach(batch_size={batch_size}): give the examples per rank and backward, at least 1")
    if population is not None and population < batch_size * world_size:
        raise UsageError(
            f"ddp.attach(population={population}): a step of {batch_size} examples on each of {world_size} ranks is not "
            "drawn from fewer without replacement; "
            "give the examples of the whole training set, or leave it out"
        )
    if sample_every != "auto" and sample_every < 1:
        raise UsageError(f'ddp.attach(sample_every={sample_every}): give a number of steps, at least 1, or "auto"')
