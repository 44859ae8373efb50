"""What a run keeps for its end, and the text it ends with."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ddp.noise.noise_scale import Reading
from ddp.noise.readings import NoiseReadings
from ddp.telemetry.sparkline import sparkline
from ddp.telemetry.summary import KEPT_READINGS, History, summary
from telemetry_records import (
    NAN,
    adam_steps,
    batch_changes,
    evaluation_records,
    feed,
    reading,
    reading_at,
    run_info,
    step_records,
    with_reading,
)


def history_of(epochs: int = 12) -> History:
    info = run_info(epochs=epochs)
    history = History(info)
    feed(history, info)
    history.close()
    return history


def test_a_run_that_reached_its_target() -> None:
    info, history = run_info(), history_of()
    text = summary(
        info,
        history,
        advice="Try 128.",
        report_path=Path("runs/digits-1/report.html"),
        metrics_url="http://127.0.0.1:9/metrics",
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    reached = next(r for r in evaluation_records(info) if r.split == "validation" and r.metrics["accuracy"] >= 0.97)
    then = step_records(info)[reached.step - 1].reading
    assert then is not None
    assert lines[0] == "run digits-1: 276 steps, 12 epochs, 2 ranks"
    assert lines[1].startswith("validation accuracy 99.4 %, loss ")
    assert lines[2] == (
        f"target accuracy 97.0 % reached at epoch {reached.epoch:.0f}, "
        f"noise scale {then.noise_scale:.0f} [{then.low:.0f}, {then.high:.0f}]"
    )
    assert lines[3] == "noise scale beyond the data (above 1,700) at the end"
    assert lines[4] == "global batch 64 examples"
    assert lines[5].startswith("its path ")
    assert sum("epoch" in line for line in lines[5:]) == 6
    assert lines[-3:] == [
        "advice Try 128.",
        "report runs/digits-1/report.html",
        "metrics http://127.0.0.1:9/metrics",
    ]


def test_a_target_that_was_missed_and_one_that_was_not_set() -> None:
    history = history_of(epochs=2)
    assert "accuracy 97.0 % was not reached" in summary(run_info(epochs=2), history)
    assert "target" not in summary(replace(run_info(epochs=2), target=None), history)


def test_a_target_for_a_metric_that_falls() -> None:
    info = replace(run_info(), metric="loss", goal="min", target=0.3)
    history = History(info)
    feed(history, info)
    reached = history.target_reached
    assert reached is not None
    losses = [record.loss for record in evaluation_records(info) if record.split == "validation"]
    assert reached.loss == next(loss for loss in losses if loss <= 0.3)
    assert "loss 0.3 reached at epoch 3, noise scale" in summary(info, history)


def test_nothing_measured_is_said() -> None:
    info = run_info()
    assert "no steps" in summary(info, History(info))
    history = History(info)
    history.step(with_reading(step_records(info, 1)[0], None))
    text = summary(info, history)
    assert "not measured" in text
    assert "validation" not in text
    assert history.advised is None and history.latest is None


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (reading("resolved", 54, 40, 75), "54 [40, 75] examples, resolved at the end"),
        (reading("wide", 54, 20, 175), "54 [20, 175] examples, wide at the end"),
        (reading("lower_bound", 54, 20, NAN), "above 20 at the end"),
        (reading("unresolved", NAN, NAN, NAN), "unresolved at the end"),
    ],
)
def test_the_state_at_the_end_is_in_words(last: object, text: str) -> None:
    info = run_info()
    history = History(info)
    history.step(with_reading(step_records(info, 1)[0], last))  # type: ignore[arg-type]
    assert text in summary(info, history)


RESOLVED = reading("resolved", 71, 56, 92)


@pytest.mark.parametrize(
    ("latest", "advised"),
    [
        (reading("unresolved", NAN, NAN, NAN), "resolved"),
        (reading("wide", 90, 30, 200), "resolved"),
        (reading("wide", 290, 80, 900), "wide"),
        (reading("lower_bound", math.inf, 40, math.inf), "resolved"),
        (reading("lower_bound", math.inf, 80, math.inf), "lower_bound"),
        (reading("beyond_data", math.inf, 2000, math.inf), "beyond_data"),
        (reading("resolved", 80, 60, 110), "latest"),
    ],
)
def test_advice_comes_from_the_latest_resolved_reading_unless_it_is_refuted(latest: Reading, advised: str) -> None:
    info, history = run_info(), History(run_info())
    held = replace(RESOLVED)
    readings = [reading("resolved", 9, 6, 12)] * 10 + [held] * 20 + [latest] * 10
    for record, of in zip(step_records(info, 40), readings, strict=True):
        history.step(with_reading(record, of))
    assert history.latest is not None and history.latest.step == 40
    assert history.advised is not None
    if advised == "resolved":
        assert (history.advised.reading, history.advised.step) == (held, 11), "the step that observed it"
    else:
        assert history.advised.reading == latest


def test_a_reading_of_another_metric_is_not_compared() -> None:
    info, history = run_info(), History(run_info())
    first, *_, last = step_records(info, 40)
    history.step(with_reading(first, RESOLVED))
    adams = reading("wide", 60, 20, 120)
    history.step(replace(last, noise=NoiseReadings(plain=RESOLVED, preconditioned=adams, headline="preconditioned")))
    assert history.advised is not None and history.advised.reading == adams


def test_a_headline_that_changes_its_metric_is_named_and_advises_from_its_own() -> None:
    info, steps = run_info(), adam_steps(run_info(), 120)
    history = History(info)
    for record in steps:
        history.step(record)
    assert history.advised is not None and history.advised.metric == "preconditioned"
    lines = [" ".join(line.split()) for line in summary(info, history).splitlines()]
    end = steps[-1].reading
    assert end is not None
    assert (
        f"noise scale {end.noise_scale:,.0f} [{end.low:,.0f}, {end.high:,.0f}] examples, resolved, in Adam's metric "
        "at the end" in lines
    )
    path = [line for line in lines if line.startswith("epoch ")]
    assert ["(wide)" in path[0], "Adam's metric" in path[0], "Adam's metric" in path[-1]] == [True, False, True]


def test_a_method_belongs_to_the_reading_that_it_moved() -> None:
    """Steps between sampled ones leave a preconditioned reading as it is, and so what it was observed from."""
    history = History(run_info())
    for record in adam_steps(run_info(), 123):
        history.step(record)
    assert history.latest is not None
    assert (history.latest.step, history.latest.method) == (123, "micro_batches")
    assert (history.latest.moved_step, history.latest.moved_epoch) == (120, 120 / 23)
    assert "in Adam's metric as of epoch 5.2\n" in summary(run_info(), history)


def test_a_batch_that_adapted_itself_and_the_one_a_reading_was_taken_at() -> None:
    info, history = run_info(), History(run_info())
    for record in step_records(info, 120):
        history.step(replace(record, global_batch_size=64 if record.step <= 46 else 128))
        if record.step == 46:
            history.batch_change(batch_changes(info)[0])
    assert "64 examples -> 128 from epoch 2 its path" in " ".join(summary(info, history).split())
    assert history.advised is not None and history.latest is not None
    assert history.advised.global_batch_size == 128
    assert (history.latest.global_batch_size, history.global_batch_size) == (128, 128)


def test_many_changes_of_the_batch_are_told_by_the_first_and_the_last() -> None:
    info, history = run_info(), History(run_info())
    for place in range(10):
        change = batch_changes(info)[0]
        history.batch_change(replace(change, epoch=float(place + 1), before=2**place, after=2 ** (place + 1)))
    line = next(line for line in summary(info, history).splitlines() if "global batch" in line)
    assert " 1 examples -> ... -> 32 from epoch 5 -> " in line and line.endswith(" -> 1,024 from epoch 10")


def test_a_long_run_is_kept_in_bounded_memory_and_evenly() -> None:
    history, template = History(run_info()), step_records(run_info(), 1)[0]
    for step in range(1, 20_001):
        history.step(with_reading(replace(template, step=step), reading_at(100)))
    kept = [timed.step for timed in history.readings]
    assert KEPT_READINGS // 2 <= len(kept) <= KEPT_READINGS
    assert len({after - before for before, after in itertools.pairwise(kept)}) == 1
    assert history.latest is not None
    assert history.latest.step == 20_000


def test_sparkline() -> None:
    assert sparkline([1, 10, 100]) == "1 ▁▄█ 100" or sparkline([1, 10, 100]) == "1 ▁▅█ 100"
    assert sparkline([10, NAN, 1000, NAN]) == "10 ▁ █ 1,000"
    assert sparkline([5, NAN]) == ""
    assert sparkline([]) == ""
