"""From the comm hook to a reading: the noise scale of a DDP model, in two lines of somebody's script.

    model = DistributedDataParallel(net)
    meter = ddp.attach(model, batch_size=32)          # examples per rank and backward
    for ...: loss.backward(); optimizer.step(); reading = meter.step(examples=len(x))

The row of a step travels with the last bucket of the *next* step: by then its squared norms are there
without waiting for a device, and the script has had the chance to say how many examples there really were.
So a reading lags one step, and no call of `meter.step` is a collective: it may be left out, or be made on one rank.
"""

import atexit
import logging
import weakref
from collections import deque
from concurrent.futures import Future as Answer
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ddp.errors import UsageError
from ddp.metering.observation import observe_step
from ddp.noise.noise_scale import NoiseScaleWindow, Reading
from ddp.transport.base import Reduction, Transport
from ddp.transport.binding import Binding
from ddp.transport.binding import pin as pin_ranks
from ddp.transport.comm_hook import GradientExchange, add_up, register
from ddp.transport.row import StepRow
from ddp.transport.select import control_group, select_transport

logger = logging.getLogger("ddp.metering")


@dataclass(slots=True)
class _Backward:
    """A synchronised backward whose row is not sent yet."""

    reductions: list[Reduction]
    examples: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a backward, which a communication thread may still be exchanging."""

    answer: Answer[NDArray[np.float64]]
    mean_squared_norm: float


class GradientMeter:
    """Measures the gradient noise scale of one DDP model; made by `attach`.

    Attributes:
        transport: what averages the model's gradients.
        batch_size: examples of one forward, where `step` does not say otherwise.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        batch_size: int,
        transport: Transport,
        binding: Binding | None = None,
    ) -> None:
        self.transport = transport
        self.batch_size = batch_size
        self._binding = binding or Binding()
        self._exchange = GradientExchange(transport)
        self._window = NoiseScaleWindow(training_examples=None)
        self._reading: Reading = self._window.reading
        self._forwards = 0
        self._last: _Backward | None = None
        self._rows: deque[_Rows] = deque()
        self._closed = False
        self._exchange.prepare(model)
        try:
            register(model, self, _attached_hook)
        except UsageError:
            transport.close()
            self.__dict__.clear()  # DDP keeps what it has refused, and with it would keep the transport's memory
            raise
        self._counting: Any = model.register_forward_pre_hook(self._count_forward)
        self._model = weakref.ref(model)
        weakref.finalize(model, register_optimizer_step_pre_hook(self._before_optimizer).remove)
        atexit.register(self.close)

    @property
    def reading(self) -> Reading:
        """The newest reading, one step behind; `unresolved` until enough steps were observed."""
        self._observe(wait=True)
        return self._reading

    def step(self, examples: int | None = None) -> Reading:
        """Say that an optimizer step is over; returns the newest reading, which lags one step.

        Args:
            examples: how many examples this rank's gradient was really taken over, accumulated backwards
                together. Left out, it is `batch_size` times the forwards with gradients since the last step.

        Raises:
            UsageError: `examples` is negative.
            TransportError: what went wrong inside this step's gradient exchange.
        """
        self._observe(wait=True)
        self._exchange.raise_error()
        if examples is not None and self._last is not None:
            if examples < 0:
                raise UsageError(f"meter.step(examples={examples}): a number of examples cannot be negative")
            self._last.examples = examples
        return self.reading

    def close(self) -> None:
        """Take no more part in the exchange of gradients, and tell the other ranks; done at exit in any case.

        DDP keeps its hook: a later backward of the model is an error at the optimizer's step.
        """
        self._closed = True
        self._counting.remove()
        atexit.unregister(self.close)
        try:
            self.transport.close()
        finally:
            self._binding.release()

    def _reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        if self._closed:
            self._exchange.attempt(_refuse)
        future = self._exchange.reduce(bucket)
        if bucket.is_last():
            last, self._last = self._last, _Backward(self._exchange.detach(), self.batch_size * self._forwards)
            self._forwards = 0
            if last is not None:
                self._exchange.attempt(lambda: self._send_row(last))
            self._exchange.attempt(lambda: self._observe(wait=False))
        return future

    def _send_row(self, backward: _Backward) -> None:
        """Of the backward before this one: its numbers are there without waiting."""
        sums = add_up(backward.reductions)
        row = StepRow(examples=backward.examples, own_squared_norm=sums.own_squared_norm)
        self._rows.append(_Rows(self.transport.start_row(row.pack()), sums.mean_squared_norm))

    def _observe(self, *, wait: bool) -> None:
        """Enter into the window the rows that have come, or all that are on their way."""
        while self._rows and (wait or self._rows[0].answer.done()):
            ready = self._rows.popleft()
            packed = self._exchange.attempt(ready.answer.result)
            if packed is None:
                continue
            rows = [StepRow.unpack(each) for each in packed]
            equal = [1.0 / len(rows)] * len(rows)
            self._reading = observe_step(self._window, rows, ready.mean_squared_norm, weights=equal)

    def _count_forward(self, module: nn.Module, arguments: Any) -> None:
        self._forwards += torch.is_grad_enabled()

    def _before_optimizer(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        """Any optimizer may hold copies of the model's parameters; after `close` only those that hold them count."""
        self._observe(wait=False)
        model = self._model()
        if not self._closed or (model is not None and _updates(optimizer, model)):
            self._exchange.raise_error()


def attach(
    model: DistributedDataParallel,
    batch_size: int,
    transport: str = "auto",
    timeout_seconds: float = 300.0,
    *,
    wire: str = "gradient",
    overlap: Literal["auto"] | bool = "auto",
    pin: Literal["auto"] | bool = False,
) -> GradientMeter:
    """Average the gradients of `model` and measure their noise scale on the way. Collective over its group.

    Args:
        model: a DistributedDataParallel model without a comm hook, before its first backward.
        batch_size: examples per rank and backward.
        transport: "auto" (shared memory on one node's CPUs, else c10d), or one by its name.
        timeout_seconds: how long a rank may stay away from an exchange before the others give it up.
        wire: what gradients travel as: "gradient" (as they are), "bfloat16", "float16" or "int8".
        overlap: whether a thread averages while backward goes on; "auto" where there is a core to spare for it.
        pin: whether to keep each rank on cores of its own until the meter is closed; "auto" where there is a
            core for each and nothing has bound them.

    Raises:
        UsageError: not a DDP model, a batch size that is not positive, a transport that is unknown or
            cannot do what is asked, or a model that has a comm hook already.
    """
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(
            f"ddp.attach takes a torch.nn.parallel.DistributedDataParallel model, not {type(model).__name__}: "
            "wrap it first, model = DistributedDataParallel(model)"
        )
    if batch_size < 1:
        raise UsageError(f"ddp.attach(batch_size={batch_size}): give the examples per rank and backward, at least 1")
    group = model.process_group
    device_type = next(model.parameters()).device.type
    binding = pin_ranks(pin, control_group(group)) if pin is not False else Binding()
    try:
        chosen = select_transport(transport, device_type, timeout_seconds, group, wire=wire, overlap=overlap)
        meter = GradientMeter(model, batch_size, chosen, binding)
    except BaseException:
        binding.release()
        raise
    if dist.get_world_size(group) == 1:
        logger.warning("one rank: nothing to compare its gradient with, so the noise scale stays unresolved")
    return meter


def _updates(optimizer: Optimizer, model: nn.Module) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def _refuse() -> None:
    raise UsageError(
        "the meter of this model is closed, so that nothing averages its gradients: close it after the last "
        "backward, or wrap the module in a new DistributedDataParallel"
    )


def _attached_hook(state: GradientMeter, bucket: dist.GradBucket) -> Future[Tensor]:
    return state._reduce(bucket)
