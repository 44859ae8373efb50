"""Looks at the layers of a watched step, on all ranks alike, and adds up what they saw in one all-reduce.

An observer of the trainer's: see `StepObserver`. Other steps cost it one look at the cadence.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from ddp.job import WatchingSection
from ddp.telemetry.records import LayersRecord
from ddp.telemetry.sinks import Sinks
from ddp.training.watching.first_layer import first_layer, weight_pictures
from ddp.training.watching.outputs import LayerOutputs, is_compiled, saturates
from ddp.training.watching.weights import ROOT, LayerWeights
from ddp.watching.cadence import Cadence
from ddp.watching.layers import WeightPictures
from ddp.watching.look import Layout, PlaceKind, UnitMemory, read_look

logger = logging.getLogger("ddp.training")

STEPS_TIMED = 25  # newest ordinary steps


class LayerWatch:
    """One rank's. What it holds is no part of a checkpoint: a resumed run looks at its first step again."""

    def __init__(
        self,
        section: WatchingSection,
        model: nn.Module,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            model: what is trained, in DDP's wrapper or not.
        """
        module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._section, self._rank, self._world_size = section, rank, world_size
        self._device, self._group = device, process_group
        self._cadence, self._laps = Cadence(section.every), _Laps()
        self._weights = LayerWeights(
            module,
            rank=rank,
            world_size=world_size,
            bins_per_octave=section.bins_per_octave,
            histograms=section.gradients,
        )
        self._kinds = {name or ROOT: type(each).__name__ for name, each in module.named_modules()}
        compiled = section.activations and is_compiled(model)
        if compiled:
            self._warn("the model is compiled, and its layers tell nothing")
        self._outputs = LayerOutputs(module, section.bins_per_octave) if section.activations and not compiled else None
        self._first = first_layer(module) if section.pictures else None
        self._units: list[int] | None = None  # of each place; agreed at the first look
        self._memory = UnitMemory()
        self._active = False
        self._seconds = 0.0  # spent on looking since the latest all-reduce

    def wants(self, step: int) -> bool:
        """Whether `step` is watched; the same on all ranks. Called before each step."""
        if self._active:
            self._drop()
        due = self._cadence.is_due(step)
        self._laps.lap(watched=due)
        return due

    def before_forward(self, step: int) -> None:
        """Put the hooks there."""
        began = time.perf_counter()
        self._active = True
        if self._outputs is not None:
            self._outputs.start(self._device)
        self._seconds += time.perf_counter() - began

    def before_update(self, step: int) -> None:
        """Averaged, unclipped gradients are in `.grad`, weights as they were."""
        began = time.perf_counter()
        if self._outputs is not None:
            self._outputs.stop()
            self._seconds += self._outputs.seconds
        self._weights.before_update(self._device)
        self._seconds += time.perf_counter() - began

    def after_update(self, step: int, sinks: Sinks) -> None:
        """Add up over ranks, and tell the sinks. Collective."""
        began = time.perf_counter()
        parts = self._weights.after_update()
        if self._outputs is not None:
            self._units = self._agree(self._outputs) if self._units is None else self._units
            parts += self._outputs.sums(self._units, self._device)
        seconds = self._seconds + time.perf_counter() - began
        own = torch.tensor([seconds, self._laps.seconds], dtype=torch.float64, device=self._device)
        vector = torch.cat([own, *(each.reshape(-1) for each in parts)])
        if self._world_size > 1:
            dist.all_reduce(vector, group=self._group)
        began = time.perf_counter()
        numbers = vector.cpu().numpy()
        cost_seconds, step_seconds = (numbers[:2] / self._world_size).tolist()
        self._cadence.looked(step, cost_seconds, step_seconds)
        if self._rank == 0:
            layers = read_look(numbers[2:], self._layout(), self._memory)
            sinks.layers(LayersRecord(step, time.time(), tuple(layers), self._pictures(), cost_seconds))
        self._active = False
        self._seconds = time.perf_counter() - began  # counted at the next look

    def _agree(self, outputs: LayerOutputs) -> list[int]:
        """How many units each place has, once: a rank may not have called what others have. Collective."""
        seen = torch.tensor([*outputs.units(), int(outputs.any_called)], dtype=torch.int64, device=self._device)
        if self._world_size > 1:
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._group)
        *units, any_called = seen.tolist()
        if outputs.places and not any_called:
            self._warn("no layer told of its output")
        return units

    def _layout(self) -> Layout:
        outputs, units = self._outputs, self._units
        places: tuple[PlaceKind, ...] = ()
        if outputs is not None and units is not None:
            places = tuple(
                PlaceKind(each.name, type(each.module).__name__, each.has_parameters, saturates(each.module), count)
                for each, count in zip(outputs.places, units, strict=True)
            )
        return Layout(
            bins_per_octave=self._section.bins_per_octave,
            weights=tuple((name, self._kinds[name]) for name in self._weights.names),
            gradients=self._section.gradients,
            places=places,
            order=() if outputs is None else tuple(outputs.order),
        )

    def _warn(self, cause: str) -> None:
        if self._rank == 0:
            logger.warning(
                "watching: %s: activations, dead and saturated units are not seen; updates, gradients and curves are",
                cause,
            )

    def _pictures(self) -> WeightPictures | None:
        return None if self._first is None else weight_pictures(*self._first)

    def _drop(self) -> None:
        """The watched step before was not taken: leave no trace of it."""
        self._active, self._seconds = False, 0.0
        if self._outputs is not None:
            self._outputs.stop()
        self._weights.drop()


class _Laps:
    """How long an ordinary step takes, from the start of one to the start of the next."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=STEPS_TIMED)
        self._began = math.nan

    def lap(self, *, watched: bool) -> None:
        """A step begins. What a watched one takes does not count."""
        now = time.perf_counter()
        if math.isfinite(self._began):
            self._latest.append(now - self._began)
        self._began = math.nan if watched else now

    @property
    def seconds(self) -> float:
        """The median, NaN before the first."""
        return median(self._latest) if self._latest else math.nan
