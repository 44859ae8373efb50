"""The whole job file: the tables together, read, overridden and validated."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import tomli_w
from pydantic import ValidationError, model_validator

from ddp.errors import JobFileError
from ddp.job.batch import BatchSection
from ddp.job.ending import AveragedWeightsSection, EarlyStoppingSection
from ddp.job.faults import in_words
from ddp.job.fields import Section
from ddp.job.initialisation import InitialisationSection
from ddp.job.optimization import OptimizerSection
from ddp.job.precision import NormalisationSection, PrecisionSection
from ddp.job.record import RecordSection
from ddp.job.sampling import SamplingSection
from ddp.job.schedule import ScheduleSection
from ddp.job.sections import (
    CheckpointSection,
    DataSection,
    EvaluationSection,
    FaultsSection,
    MetricsSection,
    NoiseScaleSection,
    RunSection,
    TransportSection,
)
from ddp.job.tasks import TaskSection
from ddp.job.toml_file import DEEPEST, is_too_deep, read_toml, toml_value
from ddp.job.trackers import TrackersSection
from ddp.job.watching import WatchingSection

MOST_FAULTS = 20  # that are told of at once
LONGEST_FAULT = 1000  # characters


class Job(Section):
    """One training job; `Job.model_validate` of the parsed TOML, see `load_job`."""

    run: RunSection
    task: TaskSection
    batch: BatchSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    initialisation: InitialisationSection = InitialisationSection()
    precision: PrecisionSection = PrecisionSection()
    normalisation: NormalisationSection = NormalisationSection()
    averaged_weights: AveragedWeightsSection = AveragedWeightsSection()
    early_stopping: EarlyStoppingSection = EarlyStoppingSection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    transport: TransportSection = TransportSection()
    noise_scale: NoiseScaleSection = NoiseScaleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    faults: FaultsSection = FaultsSection()
    metrics: MetricsSection = MetricsSection()
    record: RecordSection = RecordSection()
    trackers: TrackersSection = TrackersSection()
    watching: WatchingSection = WatchingSection()

    @model_validator(mode="after")
    def _what_adapts_is_measured(self) -> Self:
        if self.batch.adapts and not self.noise_scale.enabled:
            raise ValueError('batch.global_batch_size = "auto" follows the noise scale: it needs noise_scale.enabled')
        return self

    @model_validator(mode="after")
    def _micro_fits_global(self) -> Self:
        micro, whole = self.batch.micro_batch_size, self.batch.global_batch_size
        if micro is not None and isinstance(whole, int) and micro > whole:
            raise ValueError("batch.micro_batch_size is larger than batch.global_batch_size")
        return self

    def to_toml(self) -> str:
        """The resolved job as TOML that `load_job` reads back to an equal `Job`."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read, override and validate a job file.

    Args:
        path: the TOML file.
        overrides: `section.key=value` strings; a value is TOML where it parses as such, else a string.

    Raises:
        JobFileError: one message with a line for each fault: file, field path, what is valid.
    """
    table = read_toml(Path(path), "the job file")
    return parse_job(apply_overrides(table, overrides), source=str(path))


def parse_job(table: Mapping[str, Any], source: str = "job") -> Job:
    """Validate an already parsed table; `source` names it in messages."""
    try:
        return Job.model_validate(table)
    except ValidationError as error:
        faults = in_words(error.errors(include_url=False), Job)
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        lines = [f"{source}: {_shortened(fault)}" for fault in (*faults[:MOST_FAULTS], *more)]
        raise JobFileError("\n".join(lines)) from None


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_FAULT else f"{text[: LONGEST_FAULT // 2]} ... {text[-LONGEST_FAULT // 2 :]}"


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`table` with each `section.key=value` of `overrides` put on top; `table` stays as it is."""
    result: dict[str, Any] = copy.deepcopy(dict(table))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or len(keys) < 2 or not all(keys):
            raise JobFileError(f"--set {_shortened(override)}: write section.key=value, for example run.epochs=3")
        target = result
        for key in keys[:-1]:
            child: object = target.setdefault(key, {})
            if not isinstance(child, dict):
                raise JobFileError(f"--set {_shortened(override)}: {key[:80]} is not a table")
            target = cast(dict[str, Any], child)
        target[keys[-1]] = toml_value(text.strip())
    if is_too_deep(result):
        raise JobFileError(f"--set: tables or lists more than {DEEPEST} deep in each other")
    return result
