"""The values that the trainer hands to its sinks, and the one contract every sink fills in.

A sink lives on rank 0 only; a telemetry failure never stops a run, which is each sink's own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ddp.noise.noise_scale import Reading

PHASES = ("data", "forward", "backward", "all_reduce", "wait", "optimizer")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What does not change during a run."""

    run_id: str
    task: str
    optimizer: str
    transport: str
    version: str
    world_size: int
    global_batch_size: int
    training_examples: int
    validation_examples: int
    steps: int  # steps the run will have taken at its end
    steps_per_epoch: int
    metric: str  # evaluation.metric
    target: float | None  # evaluation.target
    start_step: int = 0  # > 0 after a resume
    restarts: int = 0
    goal: Literal["max", "min"] = "max"  # the direction in which `metric` gets better

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
    straggler_rank: int  # rank whose own work took longest in the previous step; -1 unknown
    reading: Reading | None  # None where the noise scale is switched off


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One pass over a split at fixed weights, over all ranks."""

    step: int
    epoch: float
    unix_time: float
    split: str  # "validation", or "training" for a sample of the training set of the same size
    examples: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """The metric of that name, "loss" included; None where it was not taken."""
        return self.loss if metric == "loss" else self.metrics.get(metric)


class Sink(Protocol):
    """Takes records on rank 0."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvaluationRecord) -> None: ...
    def close(self) -> None: ...
