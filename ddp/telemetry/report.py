"""One run as one self-contained HTML page, made from `run.db` and `job.toml` alone.

Works while the run goes on, on a run that was killed, and on a machine without network: styles and figures
are in the page, and its content security policy forbids it to fetch anything.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ddp.errors import UsageError
from ddp.noise.noise_scale import Reading
from ddp.telemetry import charts, recording
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.progress import epochs_text, metric_text, moment_text, number_text, reading_text
from ddp.telemetry.recording import PartsMoment
from ddp.telemetry.records import BatchChange, EvaluationRecord, RunInfo, StepRecord
from ddp.telemetry.report_page import Card, Chart, page
from ddp.telemetry.summary import History

DRAWN_STEPS = 2_000  # more would only make the page heavy
DRAWN_MOMENTS = 120  # of the layers

STATES_IN_WORDS = {
    "unresolved": "not enough observations yet, or too much noise to say anything",
    "beyond_data": "above the size of the training set: the set is nearly fitted",
    "lower_bound": "only a lower bound is known",
    "wide": "the ends of the interval are more than a factor of 4 apart",
    "resolved": "the interval is within a factor of 4",
}


@dataclass(frozen=True)
class Recorded:
    """What the page is made from."""

    parts: list[RunInfo]
    steps: list[StepRecord]  # thinned to about DRAWN_STEPS
    evaluations: list[EvaluationRecord]
    phase_seconds: list[dict[str, float]]
    changes: list[BatchChange]
    moments: list[PartsMoment]  # thinned to about DRAWN_MOMENTS
    critical_batches: list[CriticalBatch]

    @property
    def info(self) -> RunInfo:
        return self.parts[-1]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path.

    Raises:
        UsageError: no record of a run there, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the report needs matplotlib: pip install -e '.[report]'")
    recorded = read_recorded(run_dir / "run.db")
    job = run_dir / "job.toml"
    job_text = job.read_text(encoding="utf-8", errors="replace") if job.is_file() else ""
    path = run_dir / "report.html"
    _replace_text(path, render(recorded, job_text, time.time()))
    return path


def read_recorded(path: Path) -> Recorded:
    """Read a `run.db`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    with closing(recording.open_recording(path)) as database:
        try:
            parts = recording.read_parts(database)
            every = max(1, recording.count_steps(database) // DRAWN_STEPS)
            steps = list(recording.read_steps(database, every))
            evaluations = recording.read_evaluations(database)
            phase_seconds = recording.mean_phase_seconds(database)
            changes = recording.read_batch_changes(database)
            moments = recording.read_parts_over_time(database, DRAWN_MOMENTS)
            critical_batches = recording.read_critical_batches(database)
        except sqlite3.Error as error:
            raise UsageError(f"{path}: cannot read the record of the run: {error}") from None
    if not parts:
        raise UsageError(f"{path}: the run has not begun to record; try again in a few seconds")
    return Recorded(parts, steps, evaluations, phase_seconds, changes, moments, critical_batches)


def render(recorded: Recorded, job_text: str, unix_time: float) -> str:
    """The page's HTML. `unix_time` is now, to be shown."""
    info = recorded.info
    history = _history(recorded)
    subtitle = (
        f"{info.task} with {info.optimizer}, {info.world_size} ranks over {info.transport}, version {info.version}"
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_time))
    return page(
        title=info.run_id,
        subtitle=subtitle,
        note=_note(recorded),
        cards=_cards(info, history),
        charts=_charts(recorded),
        readings=_reading_rows(history),
        job_text=job_text,
        made=made,
    )


def _history(recorded: Recorded) -> History:
    """Readings and evaluations in the order in which they came."""
    history = History(recorded.info)
    recording.replay(recorded.steps, recorded.evaluations, recorded.changes, history)
    return history


def _note(recorded: Recorded) -> str:
    """How far the run is, and how often it was taken up again."""
    info = recorded.info
    if not recorded.steps:
        return "No step is recorded yet."
    last = recorded.steps[-1]
    words = [f"Step {last.step:,} of {info.steps:,}, epoch {epochs_text(last.epoch)}."]
    if last.step < info.steps:
        words[0] += " The run goes on or was stopped."
    resumes = [part.start_step for part in recorded.parts[1:]]
    if resumes:
        words.append(f"Resumed from step {', '.join(f'{step:,}' for step in resumes)}.")
    return " ".join(words)


def _cards(info: RunInfo, history: History) -> list[Card]:
    cards = [] if history.validation is None else [_validation_card(info, history.validation)]
    if info.target is not None:
        cards.append(_target_card(info, history))
    if history.latest is not None:
        cards.append(_noise_card("Noise scale at the end", history.latest.reading))
    cards.append(Card("Global batch size", f"{info.global_batch_size:,}", f"examples over {info.world_size} ranks"))
    if history.last is not None:
        cards.append(_step_card(history.last))
    return cards


def _validation_card(info: RunInfo, record: EvaluationRecord) -> Card:
    value = record.metrics.get(info.metric)
    if value is None:
        return Card("Validation loss", f"{record.loss:.4g}", f"{record.examples:,} examples")
    shown = metric_text(info.metric, value).removeprefix(f"{info.metric} ")
    return Card(f"Validation {info.metric}", shown, f"loss {record.loss:.4g}")


def _target_card(info: RunInfo, history: History) -> Card:
    assert info.target is not None
    goal = metric_text(info.metric, info.target)
    if history.target_reached is None:
        return Card("Target", "not reached", goal)
    noise = f"{goal}; noise scale then {reading_text(history.at_target.reading)}" if history.at_target else goal
    return Card("Target reached", moment_text(info, history.target_reached.step, history.target_reached.epoch), noise)


def _noise_card(title: str, reading: Reading) -> Card:
    match reading.state:
        case "resolved" | "wide":
            value = number_text(reading.noise_scale)
            detail = f"[{number_text(reading.low)}, {number_text(reading.high)}] examples, {reading.state}"
        case "lower_bound" | "beyond_data":
            value = f"> {number_text(reading.low)}"
            detail = STATES_IN_WORDS[reading.state]
        case "unresolved":
            value, detail = "unresolved", STATES_IN_WORDS["unresolved"]
    return Card(title, value, detail)


def _step_card(last: StepRecord) -> Card:
    rate = last.examples / last.duration_seconds if last.duration_seconds > 0 else float("nan")
    return Card("Latest step", f"{1000 * last.duration_seconds:.3g} ms", f"{number_text(rate)} examples/s")


def _charts(recorded: Recorded) -> list[Chart]:
    """The figures that the record has numbers for."""
    import matplotlib

    info, steps, evaluations = recorded.info, recorded.steps, recorded.evaluations
    with matplotlib.rc_context(charts.SETTINGS):
        drawn = [_noise_figure(info, steps)] if any(record.reading is not None for record in steps) else []
        if steps:
            drawn.append(Chart("Loss", charts.loss_chart(steps, evaluations), "Mean over examples, log scale."))
        if any(info.metric in record.metrics for record in evaluations):
            drawing = charts.metric_chart(evaluations, info.metric, info.target)
            caption = "Training is a sample of the training set, as large as the validation set."
            drawn.append(Chart(info.metric.capitalize(), drawing, caption))
        if recorded.phase_seconds:
            caption = "Wait is the time spent waiting for other ranks inside the all-reduce."
            drawn.append(Chart("Where the time of a step went", charts.phase_chart(recorded.phase_seconds), caption))
        if steps:
            drawn.append(Chart("Learning rate", charts.learning_rate_chart(steps), "As each step used it."))
    return drawn


def _noise_figure(info: RunInfo, steps: list[StepRecord]) -> Chart:
    narrow, wide = (
        charts.noise_chart(steps, info.global_batch_size, info.training_examples, size)
        for size in (charts.SIZE_INCHES, charts.WIDE_INCHES)
    )
    caption = (
        "Examples, log scale. Where the global batch size lies well below the noise scale more ranks still pay; "
        "well above it most of what they add is lost, if the model behind it holds."
    )
    return Chart("Gradient noise scale", narrow, caption, wide)


def _reading_rows(history: History) -> Sequence[tuple[str, ...]]:
    """About a dozen readings over the run: step, epoch, B, interval, state in words."""
    kept = history.readings
    chosen = kept if len(kept) <= 12 else [kept[round(i * (len(kept) - 1) / 11)] for i in range(12)]
    return [
        (
            f"{timed.step:,}",
            f"{timed.epoch:.2f}",
            *_interval_cells(timed.reading),
            timed.reading.state.replace("_", " "),
            STATES_IN_WORDS[timed.reading.state],
        )
        for timed in chosen
    ]


def _interval_cells(reading: Reading) -> tuple[str, str]:
    match reading.state:
        case "unresolved":
            return "–", "–"
        case "lower_bound" | "beyond_data":
            return "–", f"above {number_text(reading.low)}"
        case "resolved" | "wide":
            return number_text(reading.noise_scale), f"{number_text(reading.low)} to {number_text(reading.high)}"


def _replace_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a browser never loads half a page."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the report: {error.strerror}") from None
