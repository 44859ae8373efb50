"""The line's text, and what comes out of a pipe and of a real terminal."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import threading
from dataclasses import replace

import pytest

from ddp.noise.noise_scale import Reading
from ddp.noise.readings import NoiseReadings
from ddp.telemetry.progress import (
    Progress,
    Rate,
    done_share,
    duration_text,
    epochs_text,
    metric_text,
    moment_text,
    number_text,
    reading_text,
    render_line,
)
from ddp.telemetry.records import BatchChange, RunInfo
from telemetry_records import (
    NAN,
    batch_changes,
    evaluation_records,
    feed,
    reading,
    run_info,
    step_records,
    with_reading,
)

INFO = run_info(epochs=8)
RECORD = with_reading(replace(step_records(INFO, 74)[-1], loss=0.08713), reading("resolved", 128.4, 82.2, 247.6))
VALIDATION = replace(evaluation_records(INFO)[-1], loss=0.1234567, metrics={"accuracy": 0.9723})


def test_the_whole_line() -> None:
    assert render_line(INFO, RECORD, VALIDATION, 6123.4, 12.4) == (
        "epoch 3.2/8  loss 0.08713  accuracy 97.2 %  6,123 examples/s  noise scale 128 [82, 248]  0:12 left"
    )


def test_what_is_not_known_is_left_out() -> None:
    assert render_line(INFO, with_reading(RECORD, None), None, NAN, NAN) == "epoch 3.2/8  loss 0.08713"


def test_a_nan_loss_is_said() -> None:
    assert "loss nan" in render_line(INFO, replace(RECORD, loss=NAN), None, NAN, NAN)


def test_a_run_counted_in_steps_shows_a_fraction_of_an_epoch() -> None:
    line = render_line(replace(INFO, steps=300, epochs=300 / 23), RECORD, None, NAN, NAN)
    assert line.startswith("epoch 3.2/13 ")


@pytest.mark.parametrize(
    ("epochs", "text"), [(0.87, "0.9"), (3.2174, "3.2"), (8, "8"), (7.99, "8"), (12.5, "12.5"), (1234.56, "1,234.6"), (20_000, "20,000")]
)  # fmt: skip
def test_epochs_have_one_decimal_where_it_says_something(epochs: float, text: str) -> None:
    assert epochs_text(epochs) == text


def test_a_run_of_less_than_an_epoch_is_told_in_steps() -> None:
    short = replace(INFO, steps=1500, steps_per_epoch=14_000, epochs=1500 / 14_000)
    assert render_line(short, RECORD, None, NAN, NAN).startswith(f"step {RECORD.step}/1,500  loss")
    assert moment_text(short, 1050, 0.075) == "step 1,050"
    assert moment_text(INFO, 74, 74 / 23) == "epoch 3.2"
    assert moment_text(INFO, 23 * 1200, 1200.0) == "epoch 1,200"


@pytest.mark.parametrize("metric", ["bits_per_byte", "loss"])
def test_another_metric_than_accuracy(metric: str) -> None:
    info, record = replace(INFO, metric=metric), replace(VALIDATION, metrics={"bits_per_byte": 2.71828})
    expected = "bits_per_byte 2.718" if metric == "bits_per_byte" else "validation loss 0.1235"
    assert f"  {expected}  " in render_line(info, RECORD, record, 10.0, NAN)


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        (reading("resolved", 54.3, 40.1, 75.0), "54 [40, 75]"),
        (reading("resolved", 2.31, 1.96, 3.04), "2.3 [2, 3]"),
        (reading("wide", 30.0, 9.96, 1472.0), "30 [10, 1,472] (wide)"),
        (reading("lower_bound", 500.0, 83.4, math.inf), "above 83"),
        (reading("beyond_data", 9e5, 1700.2, math.inf), "beyond the data (above 1,700)"),
        (reading("unresolved", NAN, NAN, NAN), "unresolved"),
    ],
)
def test_readings_in_words(noise: Reading, text: str) -> None:
    assert reading_text(noise) == text


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        (reading("resolved", 54.3, 40.1, 75.0), "54 [40, 75] (Adam's metric)"),
        (reading("wide", 30.0, 9.96, 1472.0), "30 [10, 1,472] (wide; Adam's metric)"),
        (reading("lower_bound", 500.0, 83.4, math.inf), "above 83 (Adam's metric)"),
        (reading("beyond_data", 9e5, 1700.2, math.inf), "beyond the data (above 1,700; Adam's metric)"),
        (reading("unresolved", NAN, NAN, NAN), "unresolved"),
    ],
)
def test_a_metric_is_named_where_it_is_not_the_plain_one(noise: Reading, text: str) -> None:
    assert reading_text(noise, "preconditioned") == text


def test_the_line_has_the_headline_and_names_its_metric() -> None:
    plain, preconditioned = reading("resolved", 10.0, 8.0, 12.0), reading("resolved", 54.3, 40.1, 75.0)
    for noise, shown in (
        (NoiseReadings(plain, preconditioned, "preconditioned"), "54 [40, 75] (Adam's metric)"),
        (NoiseReadings(plain, preconditioned, "plain"), "10 [8, 12]"),
        (NoiseReadings(plain, None, "preconditioned"), "10 [8, 12]"),  # there is none yet to be the headline
    ):
        line = render_line(INFO, replace(RECORD, noise=noise), None, NAN, NAN)
        assert line == f"epoch 3.2/8  loss 0.08713  noise scale {shown}"


def test_numbers() -> None:
    assert [number_text(value) for value in (0.123, 9.94, 9.96, 1234567.8)] == ["0.12", "9.9", "10", "1,234,568"]
    assert [number_text(value) for value in (NAN, math.inf)] == ["?", "infinity"]
    assert [duration_text(value) for value in (-3, 0.4, 59.6, 3599.4, 3600, 86_399)] == [
        *("0:00", "0:00", "1:00", "59:59", "1:00:00", "23:59:59")
    ]
    assert metric_text("top5_accuracy", 1.0) == "top5_accuracy 100.0 %"


def test_rate_and_time_left_go_by_steps_and_clock() -> None:
    rate = Rate(INFO)
    assert math.isnan(rate.examples_per_second())
    assert math.isnan(rate.seconds_left())
    for step in range(1, 101):  # 64 examples in 0.1 s, but a step comes only every 0.25 s
        rate.observe(replace(RECORD, step=step, unix_time=1000 + 0.25 * step, duration_seconds=0.1))
    assert rate.examples_per_second() == pytest.approx(640)
    assert rate.seconds_left() == pytest.approx((INFO.steps - 100) * 0.25)


OPEN_STEPS = replace(INFO, steps=0, steps_per_epoch=0)  # run.epochs with a batch that adapts itself
OPEN_EPOCHS = replace(INFO, steps=200, steps_per_epoch=0, epochs=0.0)  # run.steps with one
OPEN = replace(OPEN_STEPS, epochs=0.0)  # adascale with one: the end is neither known in steps nor in epochs


def test_an_end_that_is_open_in_steps_or_in_epochs() -> None:
    assert render_line(OPEN, RECORD, None, NAN, NAN).startswith("epoch 3.2  loss")
    assert render_line(OPEN_STEPS, RECORD, None, NAN, NAN).startswith("epoch 3.2/8  loss")
    assert render_line(OPEN_EPOCHS, RECORD, None, NAN, NAN).startswith("step 74/200  loss")
    assert moment_text(OPEN_STEPS, 74, 3.2) == "epoch 3.2"
    assert moment_text(OPEN_EPOCHS, 74, 3.2) == "step 74"
    assert (done_share(OPEN_STEPS, RECORD), done_share(OPEN_EPOCHS, RECORD)) == (RECORD.epoch / 8, 74 / 200)


@pytest.mark.parametrize("info", [OPEN_STEPS, OPEN_EPOCHS])
def test_time_left_where_the_end_is_open(info: RunInfo) -> None:
    """2 s an epoch of 20 steps: from epoch 1.5 on 13 s to the end of epoch 8, from step 30 on 17 s to step 200."""
    rate = Rate(info)
    for step in range(1, 31):
        rate.observe(replace(RECORD, step=step, epoch=step / 20, unix_time=1000 + 0.1 * step))
    assert rate.seconds_left() == pytest.approx(13.0 if info is OPEN_STEPS else 17.0)


CHANGE = batch_changes(INFO)[0]
CHANGE_LINE = f"global batch size 64 -> 128 at epoch 2, learning rate x 1.41: {CHANGE.reason}"


def test_a_change_of_the_batch_is_a_line_of_its_own() -> None:
    stream = io.StringIO()
    progress = Progress(INFO, stream)
    progress.batch_change(CHANGE)
    progress.batch_change(replace(CHANGE, learning_rate_factor=1.0))
    progress.close()
    progress.batch_change(CHANGE)  # too late: nothing is shown after the end
    assert stream.getvalue().splitlines() == [CHANGE_LINE, CHANGE_LINE.replace(", learning rate x 1.41", "")]


def test_plain_lines_come_at_intervals_and_at_each_validation() -> None:
    stream = io.StringIO()
    progress = Progress(INFO, stream, interval_seconds=5.0)
    for step in range(1, 101):
        progress.step(replace(RECORD, step=step, epoch=step / 23, unix_time=1000.0 + step))
    assert len(stream.getvalue().splitlines()) == 20
    progress.evaluation(replace(VALIDATION, split="training"))
    assert len(stream.getvalue().splitlines()) == 20
    progress.evaluation(VALIDATION)
    progress.close()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 21
    assert "accuracy" not in lines[19]
    assert lines[20].startswith("epoch 4.3/8  loss 0.08713  accuracy 97.2 %  ")
    assert "\x1b" not in stream.getvalue()


def test_an_evaluation_before_the_first_step_shows_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(INFO, stream)
    progress.evaluation(VALIDATION)
    progress.close()
    assert stream.getvalue() == ""


def show_on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, change: BatchChange | None = None) -> str:
    """All that a whole run writes to a real terminal."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    controller, terminal = os.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # comes when the terminal's other end is closed
            while True:
                shown.extend(os.read(controller, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(terminal, "w", encoding="utf-8") as stream:
        progress = Progress(INFO, stream)
        feed(progress, INFO, last_step=46 if change else None)
        if change:
            progress.batch_change(change)
            feed(progress, replace(INFO, start_step=46))
        progress.close()
    reader.join(timeout=30)
    os.close(controller)
    return shown.decode()


def test_a_terminal_shows_one_line_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show_on_terminal(monkeypatch, columns=140)
    assert text.count("\n") == 1  # all of it was drawn in one place
    assert "━" in text
    last = text[text.rindex("epoch ") :]
    assert last.startswith("epoch 8.0/8  loss ")
    assert "0:00 left" in last
    assert "\x1b[?25h" in last  # the cursor is back


def test_on_a_terminal_a_change_of_the_batch_stays_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show_on_terminal(monkeypatch, columns=60, change=CHANGE)
    assert text.count("global batch size") == 1
    assert CHANGE_LINE in " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split())  # wrapped, not cut
    assert text.index("global batch size") < text.rindex("epoch 8.0/8")


def test_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show_on_terminal(monkeypatch, columns=60)
    last = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text[text.rindex("epoch ") :]).split())
    assert re.fullmatch(r"epoch 8\.0/8 loss \S+ accuracy \S+ % \S+ examples/s noise scale above 410 0:00 left", last)


def test_a_closed_stream_does_not_stop_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    progress = Progress(INFO, stream, interval_seconds=0.0)
    feed(progress, INFO, last_step=30)
    progress.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    feed(Progress(INFO, stream, interval_seconds=0.0), INFO, last_step=30)
