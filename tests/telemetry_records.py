"""Records of a run that never was, but looks like one: for the tests of what is shown, kept and served."""

from __future__ import annotations

import math
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ddp.noise.noise_scale import Reading, State
from ddp.noise.readings import Metric, NoiseReadings, Part, PartReading
from ddp.telemetry.records import PHASES, BatchChange, EvaluationRecord, RunInfo, Sink, StepRecord

START_UNIX_TIME = 1_760_000_000.0
EXAMPLES = 1_472
BATCH = 64
STEPS_PER_EPOCH = 23
NAN = math.nan


def run_info(*, epochs: int = 12, start_step: int = 0, restarts: int = 0, run_id: str = "digits-1") -> RunInfo:
    return RunInfo(
        run_id=run_id,
        task="digits",
        optimizer="adam",
        transport="shared_memory",
        version="0.1.0",
        world_size=2,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // 2,
        training_examples=EXAMPLES,
        validation_examples=325,
        steps=epochs * STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        epochs=float(epochs),
        metric="accuracy",
        target=0.97,
        start_step=start_step,
        restarts=restarts,
    )


def reading(state: State, noise_scale: float, low: float, high: float, observations: int = 100) -> Reading:
    return Reading(
        state=state,
        noise_scale=noise_scale,
        low=low,
        high=high,
        squared_norm=0.01,
        variance_trace=0.01 * noise_scale,
        observations=observations,
        window=min(observations, 400),
        steps_needed=40.0 if state == "resolved" else NAN,
        drifting=False,
    )


def reading_at(step: int, wobble: float = 0.0) -> Reading:
    """Grows from 30 to past the data set; unresolved, wide, resolved, a lower bound, beyond the data in turn."""
    epoch = step / STEPS_PER_EPOCH
    scale = 30 * math.exp(0.42 * epoch + wobble)
    if step < 25:
        return reading("unresolved", NAN, NAN, NAN, step)
    if step < 40:
        return reading("wide", scale, scale / 2.6, scale * 2.4, step)
    if epoch < 8:
        return reading("resolved", scale, scale / 1.45, scale * 1.6, step)
    if epoch < 10.5:
        return reading("lower_bound", scale, scale / 2.2, math.inf, step)
    return reading("beyond_data", scale * 2, 1_700.0, math.inf, step)


def with_reading(record: StepRecord, noise: Reading | None) -> StepRecord:
    """The step with this plain reading and no other, or with the noise scale switched off."""
    return replace(record, noise=None if noise is None else NoiseReadings(plain=noise))


def adam_steps(
    info: RunInfo, last_step: int, layers: int = 12, sampled_every: int = 5, seed: int = 1
) -> list[StepRecord]:
    """As with Adam: sampled steps bring the layers and a preconditioned reading, the headline from step 50 on.

    Between sampled steps the preconditioned reading is the same object, as its window gives it.
    """
    source, preconditioned, steps = random.Random(seed), reading("unresolved", NAN, NAN, NAN, 0), []
    for record in step_records(info, last_step, seed):
        noise, sampled = record.noise, record.step % sampled_every == 0
        assert noise is not None
        if sampled:
            preconditioned = reading_at(record.step, 0.7 + source.gauss(0, 0.05))
        noise = replace(
            noise,
            preconditioned=preconditioned,
            headline="preconditioned" if record.step >= 50 else "plain",
            method="micro_batches" if sampled else "ranks",
            parts=part_readings(record.step, layers) if sampled else (),
            sampled_every=sampled_every,
        )
        steps.append(replace(record, noise=noise))
    return steps


def part_readings(step: int, layers: int) -> tuple[PartReading, ...]:
    """Of `layers` layers and two groups in both metrics; later layers are noisier and longer unresolved."""
    kinds: list[Part] = [*("layer" for _ in range(layers)), "group", "group"]
    names = [*(f"blocks.{place}.linear" for place in range(layers)), "decayed", "not decayed"]
    wobbles = [*(2.5 * place / layers for place in range(layers)), 0.2, -0.4]
    metrics: tuple[Metric, ...] = ("plain", "preconditioned")
    return tuple(
        PartReading(part, name, metric, reading_at(step - round(12 * wobble), wobble + 0.7 * (metric != "plain")))
        for part, name, wobble in zip(kinds, names, wobbles, strict=True)
        for metric in metrics
    )


def batch_changes(info: RunInfo) -> list[BatchChange]:
    """The batch doubles twice, at the ends of epochs 2 and 5."""
    return [
        BatchChange(
            step=epoch * STEPS_PER_EPOCH,
            epoch=float(epoch),
            unix_time=START_UNIX_TIME + 0.02 * epoch * STEPS_PER_EPOCH,
            before=before,
            after=2 * before,
            learning_rate_factor=math.sqrt(2.0),
            reason=f"the noise scale {3 * before} and a step of 4 ms + 0.1 ms an example want {2 * before}",
        )
        for epoch, before in ((2, info.global_batch_size), (5, 2 * info.global_batch_size))
    ]


def step_records(info: RunInfo, last_step: int | None = None, seed: int = 1) -> list[StepRecord]:
    """All steps after `info.start_step` up to `last_step`, of `info.steps` where left out."""
    source = random.Random(seed)
    return [_step(info, step, source) for step in range(info.start_step + 1, (last_step or info.steps) + 1)]


def _step(info: RunInfo, step: int, source: random.Random) -> StepRecord:
    epoch = step / info.steps_per_epoch
    duration = 0.012 * source.lognormvariate(0, 0.15)
    return StepRecord(
        step=step,
        epoch=epoch,
        unix_time=START_UNIX_TIME + 0.02 * step,
        examples=info.global_batch_size,
        examples_total=step * info.global_batch_size,
        loss=2.3 * math.exp(-0.75 * epoch) * source.lognormvariate(0, 0.25) + 0.004,
        learning_rate=1e-3 * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / info.steps)),
        gradient_norm=source.lognormvariate(0, 0.3),
        duration_seconds=duration,
        phase_seconds=tuple(_phases(rank, duration) for rank in range(info.world_size)),
        all_reduce_bytes=4 * 75_000,
        straggler_rank=step % info.world_size,
        global_batch_size=info.global_batch_size,
        noise=NoiseReadings(plain=reading_at(step, source.gauss(0, 0.05))),
    )


def _phases(rank: int, duration: float) -> dict[str, float]:
    shares = (0.04, 0.28, 0.36 + 0.05 * rank, 0.10, 0.12 - 0.05 * rank, 0.10)
    return {phase: share * duration for phase, share in zip(PHASES, shares, strict=True)}


def evaluation_records(info: RunInfo, last_step: int | None = None) -> list[EvaluationRecord]:
    """One of each split at the end of each epoch."""
    records: list[EvaluationRecord] = []
    first = info.start_step // info.steps_per_epoch + 1
    for epoch in range(first, (last_step or info.steps) // info.steps_per_epoch + 1):
        for split, gap in (("training", 0.0), ("validation", 0.006)):
            accuracy = 1 - 0.42 * math.exp(-1.05 * epoch) - gap
            records.append(
                EvaluationRecord(
                    step=epoch * info.steps_per_epoch,
                    epoch=float(epoch),
                    unix_time=START_UNIX_TIME + 0.02 * epoch * info.steps_per_epoch,
                    split=split,
                    examples=325,
                    loss=2.3 * math.exp(-0.75 * epoch) + 0.01 + 4 * gap,
                    metrics={"accuracy": accuracy},
                )
            )
    return records


def feed(sink: Sink, info: RunInfo, last_step: int | None = None) -> None:
    """Hand all records to a sink in the order in which a run makes them."""
    evaluations = evaluation_records(info, last_step)
    for record in step_records(info, last_step):
        sink.step(record)
        while evaluations and evaluations[0].step == record.step:
            sink.evaluation(evaluations.pop(0))


OLDER = {  # the tables and columns of version 3, written down so that a column which came since is not taken for one
    "run": "part started_unix_time run_id task optimizer transport version world_size global_batch_size micro_batch_size "
    "training_examples validation_examples steps steps_per_epoch epochs metric target start_step restarts goal nodes "
    "gradient_bytes learning_rate_rule batch_statistics",
    "steps": "step part epoch unix_time examples examples_total loss learning_rate gradient_norm duration_seconds "
    "all_reduce_bytes straggler_rank global_batch_size slowdown_ratio headline method sampled_every plain_step "
    "preconditioned_step",
    "phases": "step rank data_seconds forward_seconds backward_seconds all_reduce_seconds wait_seconds optimizer_seconds",
    "readings": "step place metric part name state noise_scale low high squared_norm variance_trace observations window "
    "steps_needed drifting",
    "batch_changes": "step epoch unix_time before after learning_rate_factor reason",
    "evaluations": "step split part epoch unix_time examples loss",
    "evaluation_metrics": "step split name value",
    "events": "id part step unix_time kind rank text duration_seconds stall_seconds",
    "critical_batches": "method optimizer target critical_batch_size low high",
}


def make_older(path: Path) -> None:
    """The record as the release before wrote it: version 3, without what came since."""
    with closing(sqlite3.connect(path)) as database:
        for kind, name in database.execute("SELECT type, name FROM sqlite_schema WHERE type <> 'index'").fetchall():
            if name not in OLDER:
                database.execute(f"DROP {kind} {name}")
        for table, columns in OLDER.items():
            for (column,) in database.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall():
                if column not in columns.split():
                    database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 3")
        database.commit()
