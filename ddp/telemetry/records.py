"""The values that the trainer hands to its sinks, and the one contract of all sinks.

A sink lives on rank 0 only; a telemetry failure never stops a run, which is each sink's own business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ddp.noise.noise_scale import Reading
from ddp.noise.readings import Metric, NoiseReadings
from ddp.watching.layers import LayerStatistics, WeightPictures

AVERAGED = ", averaged weights"  # ends the name of a split that was evaluated with the averaged weights
PHASES = ("data", "forward", "backward", "all_reduce", "wait", "optimizer")

SAMPLED = {
    "class_balanced": "the class-balanced distribution",
    "loss_weighted": "the loss-weighted distribution",
    "loss_weighted, corrected": "loss-weighted draws whose bias is corrected",
}


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What does not change during a run."""

    run_id: str
    task: str
    optimizer: str
    transport: str
    version: str
    world_size: int
    global_batch_size: int  # at the start, where the batch adapts itself
    micro_batch_size: int
    training_examples: int
    validation_examples: int
    steps: int  # steps the run will have taken at its end; 0 where a batch that adapts itself leaves that open
    steps_per_epoch: int  # 0 where it changes
    epochs: float  # the run will have seen of the training set at its end; 0 where that is open
    metric: str  # evaluation.metric
    target: float | None  # evaluation.target
    start_step: int = 0  # > 0 after a resume
    restarts: int = 0
    goal: Literal["max", "min"] = "max"  # the direction in which `metric` gets better
    nodes: int = 1
    gradient_bytes: int = 0  # what one all-reduce of the whole gradient averages
    learning_rate_rule: str = "none"  # how the learning rate follows the batch size
    sampling: str = "uniform"  # how training examples are drawn: the noise scale is that of this distribution
    batch_statistics: bool = False  # a layer normalises over the batch, which makes a batch's examples dependent

    @property
    def sampled(self) -> str:
        """The distribution whose noise scale is measured, in words; "" for the training set as it is."""
        return SAMPLED.get(self.sampling, "")

    def target_reached_by(self, value: float | None) -> bool:
        """Whether `value` of `metric` is at least as good as the target; never for NaN, None or no target."""
        if value is None or self.target is None:
            return False
        return value >= self.target if self.goal == "max" else value <= self.target


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, seen by all ranks together."""

    step: int  # 1 for the first
    epoch: float  # epochs finished after this step, fractional
    unix_time: float
    examples: int  # in this step, over all ranks
    examples_total: int  # since the start of the run, resumed parts included
    loss: float  # mean over the step's examples
    learning_rate: float
    gradient_norm: float  # of the mean gradient, before clipping
    duration_seconds: float
    phase_seconds: tuple[Mapping[str, float], ...]  # one mapping of PHASES a rank, of the previous step
    all_reduce_bytes: int  # gradient bytes this rank averaged in this step
    straggler_rank: int  # rank that is slow by itself, step after step, up to the previous step; -1: none
    global_batch_size: int  # what the run aims at; `examples` is less in an epoch's last step
    noise: NoiseReadings | None  # None where the noise scale is switched off
    slowdown_ratio: float = math.nan  # own time of the slowest rank over the others', latest steps; NaN: not known
    metric: float = math.nan  # evaluation.metric over the step's examples; NaN where the task gives none in a step
    momentum: float = math.nan  # of the optimizer, Adam's first beta; NaN where it has none
    cpu_seconds: float = math.nan  # processor time of all ranks in the previous step

    @property
    def reading(self) -> Reading | None:
        """The headline noise scale: the one in the metric that fits the optimizer."""
        return None if self.noise is None else self.noise.reading


@dataclass(frozen=True, slots=True)
class BatchChange:
    """The batch size adapts itself: from the step after `step` on it is `after`."""

    step: int
    epoch: float
    unix_time: float
    before: int
    after: int
    learning_rate_factor: float  # of this change alone
    reason: str  # one sentence with the numbers that decided it


EventKind = Literal[
    "not_finite",
    "rolled_back",
    "straggler",
    "straggler_over",
    "replicas_differ",
    "saved",
    "save_failed",
    "stopped_early",
    "warning",
]
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened to the run at `step`.

    `rolled_back` has the step that the run went back to: what was told of later steps is void, and they come again.
    `saved` and `save_failed` have the step of the checkpoint, which a save beside training may leave behind.
    `warning` is a sentence of `ddp.watching`, which a run says once.
    """

    step: int
    unix_time: float
    kind: EventKind
    rank: int  # that it happened on; -1 where it is no single one
    text: str  # one sentence
    duration_seconds: float = math.nan  # of a save, from its beginning to the end of writing; NaN: not said
    stall_seconds: float = math.nan  # of it, for which training waited


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One pass over a split at fixed weights, over all ranks."""

    step: int
    epoch: float
    unix_time: float
    split: str  # "validation", or "training" for a sample of the training set of the same size; see AVERAGED
    examples: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    penalty: float = 0.0  # what weight decay adds to the loss: sum of weight_decay / 2 * |w|^2

    def value(self, metric: str) -> float | None:
        """The metric of that name, "loss" included; None where it was not taken."""
        return self.loss if metric == "loss" else self.metrics.get(metric)


@dataclass(frozen=True, slots=True)
class ParameterEntries:
    """Some entries of one parameter: their places in it, and value and gradient at each place.

    The gradient is the mean over the step's examples, before clipping; NaN where there is none. The value is the one
    that the gradient was taken at, before the step's update.
    """

    name: str  # as the model has it: "0.weight"
    shape: tuple[int, ...]
    places: tuple[int, ...]  # in the flattened parameter, last dimension fastest
    values: tuple[float, ...]
    gradients: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ParametersRecord:
    """The chosen parameters in one step; the same on all ranks."""

    step: int
    parameters: tuple[ParameterEntries, ...]


@dataclass(frozen=True, slots=True)
class LayersRecord:
    """What a look at one step found in the layers, over all ranks."""

    step: int
    unix_time: float
    layers: tuple[LayerStatistics, ...]  # in the order in which they were called
    pictures: WeightPictures | None = None  # None where the first layer's weights are no images
    cost_seconds: float = math.nan  # that looking took, mean over ranks


def headline_metric(noise: NoiseReadings) -> Metric:
    """The metric that `noise.reading` is in: plain until there is a preconditioned reading to be the headline."""
    return "plain" if noise.preconditioned is None else noise.headline


class Sink:
    """Takes records on rank 0. A sink overrides the methods of what it wants to hear; the rest goes past it."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvaluationRecord) -> None: ...
    def batch_change(self, record: BatchChange) -> None: ...
    def layers(self, record: LayersRecord) -> None: ...
    def event(self, record: RunEvent) -> None: ...
    def parameters(self, record: ParametersRecord) -> None: ...
    def close(self) -> None: ...
