"""What `ddp.attach` returns: it listens to a DDP model's forwards, buckets and optimizer, and measures.

The row of a step travels with the last bucket of the *next* step: by then its squared norms are there
without waiting for a device, and the script has had the chance to say how many examples there really were.
So a reading lags one step, and no call of `meter.step` is a collective: it may be left out, or be made on one rank.

All ranks sample the same steps: whether one is sampled is decided at its first forward, from the rows of all steps
but the last, which every rank has by then.
"""

import atexit
import logging
import math
import weakref
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ddp.errors import UsageError
from ddp.metering.attached_step import AttachedSteps, StepBehind
from ddp.metering.closer_look import CloserLook, StepTimer, after_averaging
from ddp.metering.mistakes import ExamplesOfOneBackward, ForwardsWithoutBackward, KeptGradients, UnscaledGradients
from ddp.noise.noise_scale import Reading
from ddp.noise.readings import NoiseReadings
from ddp.noise.tracker import NoiseScaleTracker
from ddp.transport.base import Transport
from ddp.transport.binding import Binding
from ddp.transport.comm_hook import GradientExchange, register

logger = logging.getLogger("ddp.metering")


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
        *,
        optimizer: Optimizer | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        population: int | None = None,
        sample_every: Literal["auto"] | int = "auto",
        layers: bool = True,
    ) -> None:
        self.transport = transport
        self.batch_size = batch_size
        self._binding = binding or Binding()
        self._exchange = GradientExchange(transport)
        self._scaler = grad_scaler
        self._forwards = 0
        self._decided = self._closed = False
        self._last: StepBehind | None = None
        self._exchange.prepare(model)
        try:
            register(model, self, _attached_hook)
        except UsageError:
            transport.close()
            self.__dict__.clear()  # DDP keeps what it has refused, and with it would keep the transport's memory
            raise
        tracker = NoiseScaleTracker(population, sample_every=sample_every)
        self._look = CloserLook(model.module, _averaged_parameters(model), optimizer, layers=layers)
        self._steps = AttachedSteps(
            self._exchange, tracker, self._look.parts, math.inf if population is None else population
        )
        if next(model.parameters()).device.type == "cpu":
            transport.prepare({torch.float64})  # what their squares travel in: not to be compiled inside a deadline
        self._step_count = 0  # averaged backwards
        self._timer = StepTimer()
        self._kept, self._unscaled = KeptGradients(), UnscaledGradients()
        self._of_one_backward = ExamplesOfOneBackward(batch_size)
        self._forwards_alone = ForwardsWithoutBackward(batch_size)
        if optimizer is not None:
            self._kept.watch(optimizer)  # else from the first that updates the model
        self._unscaled_asked = grad_scaler is not None
        self._counting: Any = model.register_forward_pre_hook(self._before_forward)
        self._own = {id(parameter) for parameter in model.parameters()}
        self._model = weakref.ref(model)
        weakref.finalize(model, register_optimizer_step_pre_hook(self._before_optimizer).remove)
        atexit.register(self.close)

    @property
    def readings(self) -> NoiseReadings:
        """Everything known of the noise scale, one step behind; `parts` as of the last sampled step."""
        self._steps.take_in(wait=True)
        tracker = self._steps.tracker
        return replace(tracker.readings, parts=tracker.part_readings)

    @property
    def reading(self) -> Reading:
        """The newest headline reading, one step behind; `unresolved` until enough steps were observed."""
        self._steps.take_in(wait=True)
        return self._steps.tracker.readings.reading

    def step(self, examples: int | None = None, weight: float | None = None) -> Reading:
        """Say that an optimizer step is over; returns the newest headline reading, which lags one step.

        Args:
            examples: how many examples this rank's gradient was really taken over, accumulated backwards
                together. Left out, it is `batch_size` times the forwards with gradients since the last step. Where it is
                another number, the accumulated backwards are taken to have had equal shares of it.
            weight: leave it out where each rank's loss is a mean of its own, over examples or over tokens: DDP's average
                is then the mean of the ranks' means, in which every rank counts the same, whatever tokens it has. Where the
                script scales this rank's loss by world_size * tokens / tokens_of_all_ranks, so that the average is the
                mean over all tokens, it is this rank's tokens: to be given on all ranks, then. Examples, and the
                readings, are in sequences either way.

        Raises:
            UsageError: `examples` or `weight` is negative or not a number.
            TransportError: what went wrong inside this step's gradient exchange.
        """
        self._steps.take_in(wait=True)
        self._exchange.raise_error()
        for name, value in (("examples", examples), ("weight", weight)):
            if value is not None and not (isinstance(value, Real) and 0 <= value < math.inf):
                raise UsageError(f"meter.step({name}={value!r}): give a finite number of {name}, at least 0")
        if self._last is not None:
            if examples is not None:
                self._last.examples = float(examples)
            self._look_at_examples(examples, self._last)
            if weight is not None:
                self._last.weight = float(weight)
        return self.reading

    def _look_at_examples(self, examples: int | None, step: StepBehind) -> None:
        if step.look is None or step.look.own is None:
            return
        seen = step.look.own.units
        forwards, backwards = round(seen.examples), round(seen.count)
        if examples is None:
            self._say(self._forwards_alone.observe(forwards, backwards))
        else:
            self._say(self._of_one_backward.observe(examples, backwards))

    def close(self) -> None:
        """Take no more part in the exchange of gradients, and tell the other ranks; done at exit in any case.

        DDP keeps its hook: a later backward of the model is an error at the optimizer's step.
        """
        self._closed = True
        self._counting.remove()
        self._look.drop()
        atexit.unregister(self.close)
        try:
            self.transport.close()
        finally:
            self._binding.release()

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        if torch.is_grad_enabled():
            self._exchange.attempt(self._decide)
            self._look.before_forward()
            self._forwards += 1

    def _decide(self) -> None:
        """Once a step, whether it is sampled: from the same rows on all ranks, which is why they are waited for."""
        if self._decided:
            return
        self._decided = True
        self._steps.take_in(wait=True)
        step = self._step_count + 1
        if self._steps.samples(step):
            self._look.start()

    def _reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        if self._closed:
            self._exchange.attempt(_refuse)
            return self._exchange.reduce(bucket)
        self._exchange.attempt(self._decide)  # a backward whose forward was not counted
        last, behind = bucket.is_last(), self._last
        if last and behind is not None:
            self._exchange.attempt(lambda: self._steps.send_squares(behind))
        future = self._exchange.reduce(bucket)
        if last:
            if behind is not None:
                self._exchange.attempt(lambda: self._steps.send_row(behind))
                self._say(self._kept.sentence() if behind.kept_gradients else None)
            self._end_step()
            self._exchange.attempt(lambda: self._steps.take_in(wait=False))
        return future

    def _end_step(self) -> None:
        """The last bucket is on its way: what is known of this step, and what will be when DDP is done with it."""
        self._step_count += 1
        step = StepBehind(
            reductions=self._exchange.detach(),
            examples=float(self.batch_size * self._forwards),
            scale=self._loss_scale(),
            kept=self._kept.averaged(),
            sampled=self._look.active,
            seconds=self._timer.lap(),
        )
        self._last, self._forwards, self._decided = step, 0, False
        if step.sampled:
            after_averaging(lambda: self._exchange.attempt(lambda: self._finish_look(step)))

    def _finish_look(self, step: StepBehind) -> None:
        step.look = self._look.finish()

    def _loss_scale(self) -> float | Tensor:
        """That of the backward under way; on an accelerator a copy there, for which nobody waits."""
        if self._scaler is None or not self._scaler.is_enabled():
            return 1.0
        scale = self._scaler._get_scale_async()
        return 1.0 if scale is None else scale.clone()

    def _before_optimizer(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        """Any optimizer may hold copies of the model's parameters; after `close` only those that hold them count."""
        if not self._closed:
            self._steps.take_in(wait=False)
        model = self._model()
        updates = model is not None and _updates(optimizer, self._own)
        if not self._closed or updates:
            self._exchange.raise_error()
        if updates and not self._closed:
            self._look_for_mistakes(optimizer)

    def _look_for_mistakes(self, optimizer: Optimizer) -> None:
        self._kept.watch(optimizer)
        if self._last is not None and not self._unscaled_asked and not self._unscaled.over:
            self._say(self._unscaled.observe(optimizer, self._exchange.by_parameter()))

    def _say(self, sentence: str | None) -> None:
        """Ranks run the same script: one of them says it."""
        if sentence is not None and self.transport.rank == 0:
            logger.warning(sentence)


def _averaged_parameters(model: DistributedDataParallel) -> list[Tensor]:
    """Those in DDP's buckets."""
    ignored: set[str] = getattr(model, "parameters_to_ignore", set())
    return [each for name, each in model.module.named_parameters() if each.requires_grad and name not in ignored]


def _updates(optimizer: Optimizer, own: set[int]) -> bool:
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def _refuse() -> None:
    raise UsageError(
        "the meter of this model is closed, so that nothing averages its gradients: close it after the last "
        "backward, or wrap the module in a new DistributedDataParallel"
    )


def _attached_hook(state: GradientMeter, bucket: dist.GradBucket) -> Future[Tensor]:
    return state._reduce(bucket)
