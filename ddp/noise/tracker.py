"""Every noise scale of a run side by side: the whole model's and its parts', plain and preconditioned.

One window for each; which of the two metrics is the headline; and how often the closer look is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddp.errors import CheckpointError
from ddp.noise.moments import Moments
from ddp.noise.noise_scale import NoiseScaleWindow
from ddp.noise.readings import Method, Metric, NoiseReadings, Part, PartReading
from ddp.noise.sampling import COST_CYCLE, SampleEvery, SamplingCadence

PARTS_ALWAYS_READ = 50  # steps with parts, from which one in `COST_CYCLE` has them read
SETTLED_STEPS = 50  # of an adaptive optimizer's second moments, from which they count as a preconditioner


@dataclass(frozen=True, slots=True)
class PartMoments:
    """One observation of a layer or of a group of parameters."""

    part: Part
    name: str
    metric: Metric
    moments: Moments | None


@dataclass(frozen=True, slots=True)
class StepMoments:
    """All that one step shows; None for what it does not."""

    method: Method
    plain: Moments | None
    preconditioned: Moments | None = None
    parts: Sequence[PartMoments] = ()


class NoiseScaleTracker:
    """Keeps the windows of a run.

    The headline is plain until the first preconditioned observation, which comes no earlier than an adaptive
    optimizer's second moments have `SETTLED_STEPS` steps, and preconditioned from then on.

    Args:
        training_examples: size of the training set; None for a stream.
        sample_every: K, or how it is chosen, see `SamplingCadence`.

    Attributes:
        cadence: which steps are sampled.
    """

    def __init__(
        self,
        training_examples: int | None,
        *,
        sample_every: SampleEvery = "auto",
        confidence: float = 0.95,
    ) -> None:
        self.cadence = SamplingCadence(sample_every)
        self._training_examples = training_examples
        self._confidence = confidence
        self._whole: dict[Metric, NoiseScaleWindow] = {"plain": self._window()}
        self._parts: dict[tuple[Part, str, Metric], NoiseScaleWindow] = {}
        self._with_parts = 0  # steps
        self._readings = NoiseReadings(plain=self._whole["plain"].reading, method="none")

    @property
    def readings(self) -> NoiseReadings:
        """Those of the last step."""
        return self._readings

    @property
    def part_readings(self) -> tuple[PartReading, ...]:
        """Of all parts, as their windows stand now; reads each window anew where it has changed."""
        return tuple(PartReading(*key, window.reading) for key, window in self._parts.items())

    def observe(self, step: StepMoments, *, sampled_every: int) -> NoiseReadings:
        """Take one step; what it does not show leaves its window as it was."""
        self._whole["plain"].observe(step.plain)
        if step.preconditioned is not None:
            self._whole.setdefault("preconditioned", self._window()).observe(step.preconditioned)
        preconditioned = self._whole.get("preconditioned")
        self._readings = NoiseReadings(
            plain=self._whole["plain"].reading,
            preconditioned=None if preconditioned is None else preconditioned.reading,
            headline="plain" if preconditioned is None else "preconditioned",
            method=step.method if step.plain is not None else "none",
            parts=self._observe_parts(step.parts),
            sampled_every=sampled_every,
        )
        return self._readings

    def _observe_parts(self, parts: Sequence[PartMoments]) -> tuple[PartReading, ...]:
        """Their readings, or none where they are not due: to read a window takes ten times as long as to fill it."""
        windows = [self._take_part(part) for part in parts]
        if all(part.moments is None for part in parts):
            return ()
        self._with_parts += 1
        if self._with_parts > PARTS_ALWAYS_READ and self._with_parts % COST_CYCLE:
            return ()
        return tuple(
            PartReading(part.part, part.name, part.metric, window.reading)
            for part, window in zip(parts, windows, strict=True)
        )

    def _take_part(self, part: PartMoments) -> NoiseScaleWindow:
        window = self._parts.setdefault((part.part, part.name, part.metric), self._window())
        window.take(part.moments)
        return window

    def _window(self) -> NoiseScaleWindow:
        return NoiseScaleWindow(self._training_examples, self._confidence)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and bytes: of windows what they hold, by metric and by part. Says nothing of the number of ranks."""
        return {
            "whole": {metric: _packed(window.state_dict()) for metric, window in self._whole.items()},
            "parts": [[*key, _packed(window.state_dict())] for key, window in self._parts.items()],
            "with_parts": self._with_parts,
            "sampling": self.cadence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; what the constructor was given stays.

        Raises:
            CheckpointError: the state is not one that `state_dict` made; nothing is changed then.
        """
        parts: dict[tuple[Part, str, Metric], NoiseScaleWindow]
        try:
            whole: dict[Metric, NoiseScaleWindow] = {
                metric: self._loaded(of_window) for metric, of_window in state["whole"].items()
            }
            parts = {(part, name, metric): self._loaded(of_window) for part, name, metric, of_window in state["parts"]}
            with_parts, sampling = int(state.get("with_parts", 0)), state["sampling"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"state of the noise scales cannot be read: {error!r}") from error
        if "plain" not in whole or not set(whole) <= {"plain", "preconditioned"}:
            raise CheckpointError(f"state of the noise scales is of the metrics {sorted(whole)}")
        self.cadence.load_state_dict(sampling)
        self._whole, self._parts, self._with_parts = whole, parts, with_parts
        preconditioned = whole.get("preconditioned")
        self._readings = NoiseReadings(
            plain=whole["plain"].reading,
            preconditioned=None if preconditioned is None else preconditioned.reading,
            headline="plain" if preconditioned is None else "preconditioned",
            method="none",
        )

    def _loaded(self, state: Mapping[str, Any]) -> NoiseScaleWindow:
        window = self._window()
        window.load_state_dict(_unpacked(state))
        return window


def _packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A window's numbers as bytes: of a model with many layers there are tens of thousands."""
    return {
        key: np.asarray(value, "<f8").tobytes() if isinstance(value, list) else value for key, value in state.items()
    }


def _unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: np.frombuffer(value, "<f8").tolist() if isinstance(value, bytes) else value for key, value in state.items()
    }
