"""One run as one self-contained HTML page, made from `run.db` and `job.toml` alone.

Works while the run goes on, on a run that was killed, and on a machine without network: styles and figures
are in the page, and its content security policy forbids it to fetch anything.
"""

from __future__ import annotations

import importlib.util
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ddp.errors import UsageError
from ddp.noise.readings import Method, Metric
from ddp.telemetry import charts, recording
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.layer_chart import layer_chart, rows_left_out
from ddp.telemetry.layer_figures import DRAWN_LOOKS, layer_figures
from ddp.telemetry.layer_record import read_looks, read_pictures
from ddp.telemetry.noise_charts import noise_chart
from ddp.telemetry.page_file import write_page
from ddp.telemetry.parameter_charts import parameter_charts
from ddp.telemetry.progress import METRIC_NAMES, OWN_METRIC_UNKNOWN, done_share, epochs_text
from ddp.telemetry.record_values import readable
from ddp.telemetry.recorded_parameters import Trajectory, read_trajectories
from ddp.telemetry.recording import PartsMoment
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    LayersRecord,
    RunEvent,
    RunInfo,
    StepRecord,
    headline_metric,
)
from ddp.telemetry.report_cards import run_cards
from ddp.telemetry.report_health import health_cards
from ddp.telemetry.report_page import Chart, page
from ddp.telemetry.report_tables import changes_table, critical_table, events_table, ranks_table, readings_table
from ddp.telemetry.summary import History
from ddp.telemetry.warning_text import warnings_table
from ddp.watching.layers import WeightPictures

DRAWN_STEPS = 2_000  # more would only make the page heavy
DRAWN_MOMENTS = 120  # of the layers


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
    methods: set[Method]  # by which the noise scale was observed
    events: list[RunEvent]
    looks: list[LayersRecord]  # thinned to DRAWN_LOOKS
    pictures: list[tuple[int, WeightPictures]]
    times: tuple[float, float, float] | None  # began, latest record, seconds of all steps: see `read_times`
    parameters: list[Trajectory]  # of chosen entries

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
    job_text = job.read_text(encoding="utf-8", errors="replace") if job.is_file() and not job.is_symlink() else ""
    path = run_dir / "report.html"
    with readable(run_dir / "run.db"):  # a number may be one that cannot be shown
        text = render(recorded, job_text, time.time())
    return write_page(path, text)


def read_recorded(path: Path) -> Recorded:
    """Read a `run.db`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    with closing(recording.open_recording(path)) as database, readable(path):
        parts = recording.read_parts(database)
        every = max(1, recording.count_steps(database) // DRAWN_STEPS)
        steps = list(recording.read_steps(database, every))
        evaluations = recording.read_evaluations(database)
        phase_seconds = recording.mean_phase_seconds(database)
        changes = recording.read_batch_changes(database)
        moments = recording.read_parts_over_time(database, DRAWN_MOMENTS)
        critical_batches = recording.read_critical_batches(database)
        methods = recording.read_methods(database)
        events = recording.read_events(database)
        looks, pictures = read_looks(database, DRAWN_LOOKS), read_pictures(database)
        times = recording.read_times(database)
        parameters = read_trajectories(database)
    if not parts:
        raise UsageError(f"{path}: the run has not begun to record; try again in a few seconds")
    return Recorded(
        parts,
        steps,
        evaluations,
        phase_seconds,
        changes,
        moments,
        critical_batches,
        methods,
        events,
        looks,
        pictures,
        times,
        parameters,
    )


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
        cards=[
            *run_cards(info, history, recorded.critical_batches),
            *health_cards(recorded.parts, history.last, recorded.events, recorded.times),
        ],
        charts=_charts(recorded),
        tables=(
            warnings_table(recorded.events),
            events_table(recorded.events),
            ranks_table(recorded.phase_seconds),
            readings_table(history),
            changes_table(info, recorded.changes),
            critical_table(recorded.critical_batches),
        ),
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
    of_steps = f" of {info.steps:,}" if info.steps else ""
    of_epochs = f" of {epochs_text(info.epochs)}" if info.epochs and not info.steps else ""
    epoch = f", epoch {epochs_text(last.epoch)}{of_epochs}" if info.training_examples else ""
    words = [f"Step {last.step:,}{of_steps}{epoch}."]
    if done_share(info, last) < 1.0 - 1e-9:
        words[0] += " The run goes on or was stopped."
    if not info.training_examples:
        words.append(
            "The training stream does not say how long it is: one epoch is a pass, or all that the run is to take."
        )
    resumes = [part.start_step for part in recorded.parts[1:]]
    if resumes:
        words.append(f"Resumed from step {', '.join(f'{step:,}' for step in resumes)}.")
    return " ".join(words)


def _charts(recorded: Recorded) -> list[Chart]:
    """The figures that the record has numbers for."""
    import matplotlib

    info, steps, evaluations = recorded.info, recorded.steps, recorded.evaluations
    with matplotlib.rc_context(charts.SETTINGS):
        headline = _headline(steps)
        drawn = [_noise_figure(recorded, headline), *_layer_figure(recorded, headline)] if headline else []
        if steps:
            drawn.append(Chart("Loss", charts.loss_chart(steps, evaluations), "Mean over examples, log scale."))
        if any(info.metric in record.metrics for record in evaluations):
            drawing = charts.metric_chart(steps, evaluations, info.metric, info.target)
            caption = "Training is a sample of the training set, as large as the validation set."
            drawn.append(Chart(info.metric.capitalize(), drawing, caption))
        if recorded.phase_seconds:
            caption = "Wait is the time spent waiting for other ranks inside the all-reduce."
            drawn.append(Chart("Where the time of a step went", charts.phase_chart(recorded.phase_seconds), caption))
        if steps:
            drawn.append(Chart("Learning rate", charts.learning_rate_chart(steps), "As each step used it."))
        if charts.changes(steps, "momentum"):
            drawn.append(Chart("Momentum", charts.momentum_chart(steps), "As each step used it."))
        drawn += parameter_charts(recorded.parameters)
        drawn += layer_figures(recorded.looks, recorded.pictures, evaluations, info.metric)
    return drawn


def _headline(steps: list[StepRecord]) -> Metric | None:
    """The latest headline's metric; None where the noise scale was off all along."""
    return next((headline_metric(record.noise) for record in reversed(steps) if record.noise is not None), None)


def _noise_figure(recorded: Recorded, headline: Metric) -> Chart:
    info = recorded.info
    narrow, wide = (
        noise_chart(recorded.steps, headline, info.training_examples, recorded.critical_batches, size)
        for size in (charts.SIZE_INCHES, charts.WIDE_INCHES)
    )
    caption = (
        "Examples, log scale. Where the global batch size lies well below the noise scale more ranks still pay; "
        "well above it most of what they add is lost, if the model behind it holds."
    )
    return Chart("Gradient noise scale", narrow, " ".join([caption, *_limits(recorded)]), wide)


def _limits(recorded: Recorded) -> list[str]:
    """Where the way it was measured limits the number."""
    info, limits = recorded.info, list[str]()
    if info.sampled:
        limits.append(
            f"Examples were drawn with replacement: the number is that of {info.sampled}, not of the training set as it is."
        )
    if info.optimizer in OWN_METRIC_UNKNOWN:
        limits.append(
            f"It is the plain one, tr(Sigma)/|G|^2, which fits SGD's steps; {info.optimizer} scales gradients in a metric of "
            "its own, in which it is not measured."
        )
    if info.batch_statistics:
        limits.append(
            "The model normalises over its batches, so the examples of a micro-batch depend on each other: the number "
            f"is that of batches normalised {info.micro_batch_size:,} at a time, and others would give another one."
        )
    if "split" in recorded.methods:
        limits.append(
            "One rank took its batch in two halves to have two gradients to compare: its interval stays wider than "
            "with more ranks or micro-batches."
        )
    if recorded.methods <= {"none"}:
        limits.append("No step had two gradients to compare (one rank without accumulation): nothing is measured.")
    return limits


def _layer_figure(recorded: Recorded, headline: Metric) -> list[Chart]:
    """In the headline's metric; [] where no layer was resolved."""
    moments, end = recorded.moments, recorded.steps[-1].epoch
    narrow, wide = (layer_chart(moments, headline, end, size[0]) for size in (charts.SIZE_INCHES, charts.WIDE_INCHES))
    if narrow is None:
        return []
    named = f", in {METRIC_NAMES[headline]}" if headline != "plain" else ""
    caption = f"Examples, log scale{named}; layers in the model's order, the optimizer's groups below."
    if left_out := rows_left_out(moments):
        caption += f" {left_out:,} more are in run.db."
    return [Chart("Noise scale of each layer", narrow, caption, wide)]
