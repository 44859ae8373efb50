"""`ddp advise`: what a run's own record says about running it on more ranks, or with another batch.

Reads `run.db` and `job.toml`, tries batches where that is wanted, and puts the models of this package together.
Advice comes from the latest `resolved` reading of the noise scale, or from a lower bound where there is no resolved
one; without either it says what the step times alone tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddp.diagnostics import communication, step_time
from ddp.diagnostics.batch_size_finder import BatchTrials, LargestBatch, TrialError, largest_batch
from ddp.diagnostics.communication import Links, Measured
from ddp.diagnostics.scaling import Baseline, Row, Scaling, StopsPaying
from ddp.diagnostics.step_time import StepCost, StepSeconds
from ddp.errors import UsageError
from ddp.job import OptimizerSection, check_import, load_job
from ddp.noise.advice import advise as sentence
from ddp.noise.advice import stands
from ddp.noise.efficiency import noise_scale_of
from ddp.noise.learning_rate import rate_factor
from ddp.noise.noise_scale import Reading
from ddp.noise.readings import Method, Metric
from ddp.telemetry import recording
from ddp.telemetry.progress import moment_text
from ddp.telemetry.record_values import readable
from ddp.telemetry.records import RunInfo, StepRecord, headline_metric

TIMED_STEPS = 2_000  # the latest ones, whose times count
RANKS_OF_A_NODE = 8  # where the run had one node
SHOWN_RANKS = 64
LARGEST_FOR_LINE = 4  # trials of up to so many micro-batches' examples tell what a micro-batch costs by itself


@dataclass(frozen=True, slots=True)
class MemoryQuestion:
    """How batches are tried."""

    seconds: float = 60.0
    memory_bytes: int | None = None
    allow_import: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """What the user wants to know, and what is to be assumed; empty `ranks` are 1, 2, 4 and so on."""

    ranks: tuple[int, ...] = ()
    price_per_rank_hour: float | None = None
    ranks_per_node: int | None = None
    links: Links = field(default_factory=Links)
    memory: MemoryQuestion | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A reading, the step that observed it and how, the global batch size of that step, and the examples until then."""

    step: int
    epoch: float
    examples_total: int
    global_batch_size: int
    metric: Metric
    method: Method
    reading: Reading

    def sentence(self, info: RunInfo) -> str:
        when = moment_text(info, self.step, self.epoch)
        return sentence(self.reading, self.global_batch_size, when, self.metric, self.method, info.sampled)


@dataclass(frozen=True, slots=True)
class Record:
    """What is read of a run: its latest part, its latest steps, and its readings."""

    info: RunInfo
    steps: tuple[StepRecord, ...]  # the latest, at least one
    latest: Told | None
    resolved: Told | None

    @property
    def last(self) -> StepRecord:
        return self.steps[-1]

    @property
    def used(self) -> Told | None:
        """The reading that advice comes from."""
        if self.resolved is None and self.latest is not None and self.latest.reading.state == "lower_bound":
            return self.latest
        return self.resolved

    @property
    def is_refuted(self) -> bool:
        """Whether a later reading says otherwise: then advice is on the way to the one that is used only."""
        latest, used = self.latest, self.used
        if latest is None or used is None:
            return False
        return not stands(used.reading, latest.reading, same_metric=latest.metric == used.metric)

    @property
    def horizon(self) -> tuple[int, int]:
        """The step whose loss advice is about, and the examples until then."""
        if self.used is not None and self.is_refuted:
            return self.used.step, self.used.examples_total
        return self.last.step, self.last.examples_total


@dataclass(frozen=True, slots=True)
class Advice:
    """All that is said; `advice_text` and `advice_page` say it.

    Attributes:
        scaling, rows, same_stops: None and empty where too few steps were timed.
        grown_stops: None also where nothing is known of the noise scale.
        largest: None where batches were not tried, and `not_tried` says why.
    """

    record: Record
    optimizer: OptimizerSection
    price_per_rank_hour: float | None
    scaling: Scaling | None
    rows: tuple[Row, ...]
    same_stops: StopsPaying | None
    grown_stops: StopsPaying | None
    largest: LargestBatch | None
    not_tried: str


def advise(run_directory: Path, question: Question) -> Advice:
    """Everything there is to say about a run.

    Raises:
        UsageError: no record of a run there, no step in it, or a job file that cannot be read.
    """
    record, job_file = read_record(run_directory / "run.db"), run_directory / "job.toml"
    held = _held(record.info, job_file)
    if held is not None:
        record = replace(record, info=replace(record.info, micro_batch_size=held(record.last.global_batch_size)))
    largest, not_tried = _largest(record.info, job_file, question.memory)
    steps = step_time.observe(record.info, record.steps, held)
    scaling = _scaling(record, steps, _optimizer(record.info, job_file), question, largest)
    ranks = question.ranks or default_ranks(record.info.world_size)
    return Advice(
        record=record,
        optimizer=_optimizer(record.info, job_file),
        price_per_rank_hour=question.price_per_rank_hour,
        scaling=scaling,
        rows=scaling.rows(ranks) if scaling else (),
        same_stops=scaling.same_stops_paying() if scaling else None,
        grown_stops=scaling.grown_stops_paying() if scaling else None,
        largest=largest,
        not_tried=not_tried,
    )


def default_ranks(world_size: int) -> tuple[int, ...]:
    """Powers of two up to 64 or four times the run's, and the run's own number."""
    largest = max(SHOWN_RANKS, 4 * world_size)
    powers = {1 << power for power in range(largest.bit_length())}
    return tuple(sorted(powers | {world_size}))


def read_record(path: Path) -> Record:
    """Read a `run.db`, also of a run that goes on.

    Raises:
        UsageError: there is none, it cannot be read, or it holds no step yet.
    """
    with closing(recording.open_recording(path)) as database, readable(path):
        parts = recording.read_parts(database)
        steps: deque[StepRecord] = deque(maxlen=TIMED_STEPS)
        latest = resolved = None
        for record in recording.read_steps(database):
            steps.append(record)
            if record.reading is None or (latest is not None and record.reading is latest.reading):
                continue  # held since the step that observed it
            latest = record
            resolved = record if record.reading.state == "resolved" else resolved
    if not parts or not steps:
        raise UsageError(f"{path}: the run has not recorded a step yet; try again in a few seconds")
    return Record(parts[-1], tuple(steps), latest and _told(latest), resolved and _told(resolved))


def _told(record: StepRecord) -> Told | None:
    noise = record.noise
    if noise is None:
        return None
    return Told(
        *(record.step, record.epoch, record.examples_total, record.global_batch_size),
        *(headline_metric(noise), noise.method, noise.reading),
    )


def _largest(info: RunInfo, job_file: Path, question: MemoryQuestion | None) -> tuple[LargestBatch | None, str]:
    if question is None:
        return None, "Batches were not tried."
    if not job_file.is_file():
        return None, f"Batches were not tried: there is no {job_file}."
    try:
        check_import(load_job(job_file).task, question.allow_import)
    except UsageError as error:
        return None, f"Batches were not tried: {error}."
    batch_trials = BatchTrials(
        job_file=job_file,
        local_ranks=info.world_size // info.nodes,
        seconds=question.seconds,
        memory_bytes=question.memory_bytes,
        allow_import=question.allow_import,
    )
    try:
        return largest_batch(batch_trials, start=max(2, info.micro_batch_size // LARGEST_FOR_LINE)), ""
    except TrialError as error:
        return None, f"Batches were not tried: {error}."


def _held(info: RunInfo, job_file: Path) -> Callable[[int], int] | None:
    """The micro-batch size by the global batch size, where the first is left open and the second adapts itself."""
    batch = load_job(job_file).batch if job_file.is_file() else None
    if batch is None or not batch.adapts or batch.micro_batch_size is not None:
        return None
    return lambda size: batch.examples_at_once(info.world_size, size)


def _optimizer(info: RunInfo, job_file: Path) -> OptimizerSection:
    if job_file.is_file():
        return load_job(job_file).optimizer
    return OptimizerSection.model_validate({"name": info.optimizer, "learning_rate_rule": info.learning_rate_rule})


def _scaling(
    record: Record,
    steps: Sequence[StepSeconds],
    optimizer: OptimizerSection,
    question: Question,
    largest: LargestBatch | None,
) -> Scaling | None:
    info, last = record.info, record.last
    cost = step_time.fit(info, steps, _trials(info, largest))
    if cost is None:
        return None

    def learning_rate_factor(noise_scale: float, before: float, after: float) -> float:
        return rate_factor(optimizer.rule, before, after, noise_scale, optimizer.rule_exponent)

    return Scaling(
        baseline=Baseline(
            global_batch_size=last.global_batch_size,
            world_size=info.world_size,
            steps=record.horizon[1] / last.global_batch_size,
            training_examples=info.training_examples or last.examples_total,  # of a stream that does not say
        ),
        cost=cost,
        communication=communication.fit(_measured(info, cost), _links(info, question)),
        noise_scale=None if record.used is None else noise_scale_of(record.used.reading),
        learning_rate_factor=learning_rate_factor,
    )


def _trials(info: RunInfo, largest: LargestBatch | None) -> list[tuple[int, float]]:
    """Of the sizes near the run's own: a much larger batch may leave the cache and no longer lie on their line."""
    most = LARGEST_FOR_LINE * info.micro_batch_size
    tried = largest.trials if largest else ()
    return [(trial.examples, trial.seconds) for trial in tried if trial.fits and trial.examples <= most]


def _measured(info: RunInfo, cost: StepCost) -> Measured:
    return Measured(info.gradient_bytes, info.world_size, info.nodes, cost.all_reduce_seconds)


def _links(info: RunInfo, question: Question) -> Links:
    local = info.world_size // info.nodes
    ranks = question.ranks_per_node or (local if info.nodes > 1 else max(RANKS_OF_A_NODE, local))
    return replace(question.links, ranks_per_node=ranks)
