"""The page against the database it was made from; and in a real browser."""

from __future__ import annotations

import html
import itertools
import math
import os
import re
import sqlite3
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from browser import drawn
from ddp.errors import UsageError
from ddp.telemetry.charts import running_mean
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.records import RunEvent, RunInfo
from ddp.telemetry.report import DRAWN_STEPS, write_report
from ddp.telemetry.report_health import health_cards
from ddp.watching.finding import Finding
from telemetry_records import (
    adam_steps,
    batch_changes,
    evaluation_records,
    feed,
    part_readings,
    run_info,
    step_records,
)

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"


def record_run(directory: Path, info: RunInfo, last_step: int | None = None) -> Path:
    recorder = Recorder(directory / "run.db", info)
    feed(recorder, info, last_step)
    recorder.close()
    return directory


def parse(path: Path) -> ElementTree.Element:
    """The page as XML, which also says that every element is closed and every string escaped."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    (directory / "job.toml").write_text('[run]\nid = "<b>digits & co</b>"\n')
    return write_report(record_run(directory, run_info()))


def test_the_cards_are_the_record(page: Path) -> None:
    with closing(sqlite3.connect(page.parent / "run.db")) as database:
        (accuracy,) = database.execute(
            "SELECT value FROM evaluation_metrics WHERE split = 'validation' ORDER BY step DESC LIMIT 1"
        ).fetchone()
        (low, state) = database.execute("SELECT low, state FROM readings ORDER BY step DESC LIMIT 1").fetchone()
        (reached,) = database.execute(
            "SELECT min(epoch) FROM evaluations JOIN evaluation_metrics USING (step, split) "
            "WHERE split = 'validation' AND value >= 0.97"
        ).fetchone()
    root = parse(page)
    cards = {
        words(card.find("dt")): (words(card.find("dd/div[1]")), words(card.find("dd/div[2]")))  # type: ignore[arg-type]
        for card in root.iter("div")
        if card.get("class") == "card"
    }
    assert cards["Validation accuracy"][0] == f"{100 * accuracy:.1f} %"
    assert cards["Target reached"][0] == f"epoch {reached:g}"
    assert (cards["Noise scale at the end"][0], state) == (f"> {low:,.0f}", "beyond_data")
    assert cards["Global batch size"] == ("64", "examples over 2 ranks")


def table(root: ElementTree.Element, title: str) -> list[dict[str, str]]:
    """The rows of a table by its headings."""
    for section in root.iter("section"):
        heading = section.find("h2")
        if heading is not None and words(heading) == title:
            names = [words(cell) for cell in section.iter("th")]
            rows = [[words(cell) for cell in row.iter("td")] for row in section.iter("tr")]
            return [dict(zip(names, row, strict=True)) for row in rows if row]
    return []


READINGS = "Readings of the noise scale, in examples"


def test_the_table_is_the_record(page: Path) -> None:
    rows = table(parse(page), READINGS)
    assert len(rows) == 12
    with closing(sqlite3.connect(page.parent / "run.db")) as database:
        for row in rows:
            query = "SELECT epoch, noise_scale, low, high, state FROM steps JOIN readings USING (step) WHERE step = ?"
            epoch, point, low, high, state = database.execute(query, (int(row["Step"]),)).fetchone()
            assert (row["Epoch"], row["State"]) == (f"{epoch:.2f}", state.replace("_", " "))
            assert (row["Global batch"], row["Metric"], row["From"]) == ("64", "plain", "ranks")
            if state == "resolved":
                assert (row["Noise scale"], row["95 % interval"]) == (f"{point:,.0f}", f"{low:,.0f} to {high:,.0f}")
    assert {row["State"] for row in rows} == {"unresolved", "wide", "resolved", "lower bound", "beyond data"}


CRITICAL = CriticalBatch("sweep", "adam", "loss 0.3", 147.0, 120.0, 180.0)


@pytest.fixture(scope="module")
def adam_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both metrics, 12 layers, a batch that adapts itself, and a critical batch size that runs have measured."""
    directory, info = tmp_path_factory.mktemp("adam"), run_info()
    open_ended = replace(info, steps=0, steps_per_epoch=0, batch_statistics=True)
    recorder, changes = Recorder(directory / "run.db", open_ended, [CRITICAL]), batch_changes(info)
    for record in adam_steps(info, 253):
        batch = next((change.after for change in reversed(changes) if record.step > change.step), 64)
        recorder.step(replace(record, global_batch_size=batch))
    for change in changes:
        recorder.batch_change(change)
    recorder.close()
    return write_report(directory)


def test_cards_and_tables_name_metric_method_and_batch(adam_page: Path) -> None:
    root = parse(adam_page)
    text = words(root)
    assert "Step 253, epoch 11 of 12. The run goes on or was stopped." in text
    assert "Noise scale as of epoch 10.9, Adam's metric" in text and "Plain noise scale, latest" in text
    assert "256examples over 2 ranks; adapted itself 2 times, from 64" in text
    assert "Critical batch size, measured147[120, 180] examples, by sweep with adam to loss 0.3" in text
    assert text.count("normalised 32 at a time") == 1
    rows = table(root, READINGS)
    assert {(int(row["Step"]) >= 50, row["Metric"]) for row in rows} == {(False, "plain"), (True, "Adam's metric")}
    assert {row["From"] for row in rows if int(row["Step"]) >= 50} == {"micro-batches"}  # which moved that reading
    for row in rows:
        step = int(row["Step"])
        assert row["Global batch"] == ("64" if step <= 46 else "128" if step <= 115 else "256")
    changes = table(root, "Changes of the global batch size, in examples")
    assert [(row["When"], row["From"], row["To"], row["Learning rate"]) for row in changes] == [
        ("epoch 2", "64", "128", "x 1.41"),
        ("epoch 5", "128", "256", "x 1.41"),
    ]
    (measured,) = table(root, "Critical batch sizes that runs have measured, in examples")
    assert list(measured.values()) == ["sweep", "adam", "loss 0.3", "147", "120 to 180"]


def test_one_chart_has_both_metrics_and_the_stairs_of_the_batch(adam_page: Path) -> None:
    """Axis from the stairs, 64 and 256 examples, and the epochs of the changes; both lines are then read off."""
    chart = figure(parse(adam_page), "Gradient noise scale")
    svg = next(chart.iter(f"{SVG}svg"))
    stairs = paths(svg, "red", dashed=True)[0]
    (low_y, middle_y, high_y) = sorted(set(stairs[:, 1]), reverse=True)
    assert low_y - middle_y == pytest.approx(middle_y - high_y, rel=1e-3)  # two doublings on a log scale
    per_pixel = math.log(4) / (low_y - high_y)
    second, fifth = stairs[np.flatnonzero(np.diff(stairs[:, 1])), 0]
    for colour, metric in (("blue", "preconditioned"), ("teal", "plain")):
        line = max(paths(svg, colour, dashed=False), key=len)
        epochs = 2 + (line[:, 0] - second) * 3 / (fifth - second)
        drawn = 64 * np.exp((low_y - line[:, 1]) * per_pixel)
        steps = adam_steps(run_info(), 253)
        for epoch, value in zip(epochs, drawn, strict=True):
            expected = getattr(steps[round(epoch * 23) - 1].noise, metric)
            assert value == pytest.approx(expected.noise_scale, rel=0.02)
    legend = [words(item) for item in chart.iter("li")]
    assert legend[:2] == ["noise scale, Adam's metric", "95 % interval"]
    assert "noise scale, plain" in legend and "global batch size, 64 to 256" in legend
    assert "critical batch size 147 (sweep, adam, loss 0.3)" in legend


def rectangles(svg: ElementTree.Element) -> list[tuple[float, float, float, str]]:
    """Middle height, left and right end and fill of the picture's rectangles."""
    found: list[tuple[float, float, float, str]] = []
    for path in svg.iter(f"{SVG}path"):
        fill = re.search(r"fill: ([^;]+)", path.get("style", ""))
        points = np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), dtype=float)
        if path.get("clip-path") and fill and len(points) >= 4:
            x, y = points.T
            found.append((round(float(y.mean()), 1), float(x.min()), float(x.max()), fill[1]))
    return found


def test_layers_are_in_order_and_as_dark_as_their_readings(adam_page: Path) -> None:
    chart = figure(parse(adam_page), "Noise scale of each layer")
    drawn = rectangles(next(chart.iter(f"{SVG}svg")))
    counts = Counter(y for y, *_ in drawn)
    rows = sorted(y for y, count in counts.items() if count > 1)  # the colour bar has one to a height
    left, right = min(x for _, x, _, _ in drawn), max(x for y, _, x, _ in drawn if y in rows)
    moments = [record for record in adam_steps(run_info(), 253) if record.noise and record.noise.parts]
    seen: dict[str, list[float]] = {}
    for record in moments:
        x = left + (record.epoch - 2.5 / 23) / moments[-1].epoch * (right - left)  # between two moments
        assert record.noise is not None
        readings = [each.reading for each in record.noise.parts if each.metric == "preconditioned"]
        for y, reading in zip(rows, readings, strict=True):
            fills = [fill for row, start, end, fill in drawn if row == y and start <= x <= end]
            if reading.state == "unresolved":
                assert fills == ["var(--grid)"]
            elif reading.state in ("resolved", "wide"):
                (fill,) = fills
                seen.setdefault(fill, []).append(reading.noise_scale)
            else:
                assert any(fill.startswith("url(#") for fill in fills)
    spans = sorted((min(values), max(values)) for values in seen.values())
    assert len(spans) >= 5
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))  # one colour, one range
    labels = [words(each) for each in next(chart.iter(f"{SVG}svg")).iter(f"{SVG}text")]
    assert [label for label in labels if "linear" in label or "group" in label] == [
        *(f"blocks.{place}.linear" for place in range(12)),
        *("group decayed", "group not decayed"),
    ]


def test_a_model_of_many_layers_is_drawn_in_part_and_says_so(tmp_path: Path) -> None:
    template = step_records(run_info(), 30)[-1]
    assert template.noise is not None
    recorder = Recorder(tmp_path / "run.db", run_info())
    for step in range(30, 60, 2):
        noise = replace(template.noise, parts=part_readings(step + 40, 98))
        recorder.step(replace(template, step=step, epoch=step / 23, noise=noise))
    recorder.close()
    root = parse(write_report(tmp_path))
    chart = figure(root, "Noise scale of each layer")
    assert "36 more are in run.db" in words(chart)
    assert len({y for y, *_ in rectangles(next(chart.iter(f"{SVG}svg")))}) >= 64


def test_one_rank_that_splits_its_batch_is_told_apart_from_one_that_measures_nothing(tmp_path: Path) -> None:
    template, words_of = step_records(run_info(), 30)[-1], dict[str, str]()
    assert template.noise is not None
    for method in ("split", "none"):
        (directory := tmp_path / method).mkdir()
        recorder = Recorder(directory / "run.db", replace(run_info(), world_size=1))
        recorder.step(replace(template, noise=replace(template.noise, method=method)))
        recorder.close()
        words_of[method] = words(parse(write_report(directory)))
    assert "took its batch in two halves" in words_of["split"] and "No step had two" not in words_of["split"]
    assert "No step had two gradients to compare" in words_of["none"] and "halves to" not in words_of["none"]


def figure(root: ElementTree.Element, title: str) -> ElementTree.Element:
    return next(each for each in root.iter("figure") if words(each.find("h2")) == title)  # type: ignore[arg-type]


def test_the_points_of_the_accuracy_chart_are_the_record(page: Path) -> None:
    uses = [
        (use.get("style", ""), float(use.get("x", "nan")), float(use.get("y", "nan")))
        for use in figure(parse(page), "Accuracy").iter(f"{SVG}use")
    ]
    drawn = {colour: [(x, y) for style, x, y in uses if f"--{colour}" in style] for colour in ("green", "orange")}
    records = evaluation_records(run_info())
    for colour, split in (("green", "training"), ("orange", "validation")):
        chosen = [record for record in records if record.split == split]
        x, y = np.array(drawn[colour]).T
        assert np.corrcoef(x, [record.epoch for record in chosen])[0, 1] > 0.999999
        assert np.corrcoef(y, [record.metrics["accuracy"] for record in chosen])[0, 1] < -0.999999  # y goes down


def paths(svg: ElementTree.Element, colour: str, *, dashed: bool | None = None) -> list[np.ndarray]:
    """Points of the stroked paths of a colour, one array a path."""
    found: list[np.ndarray] = []
    for path in svg.iter(f"{SVG}path"):
        style = path.get("style", "")
        if f"stroke: var(--{colour})" in style and dashed in (None, "stroke-dasharray" in style):
            numbers = re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))
            found.append(np.array(numbers, dtype=float))
    return found


def test_the_noise_chart_is_the_record(page: Path) -> None:
    """Two known levels, the batch of 64 and the training set of 1,472, give the axis; the line is then read off."""
    svg = next(figure(parse(page), "Gradient noise scale").iter(f"{SVG}svg"))
    batch_y = paths(svg, "red", dashed=True)[0][0, 1]
    training_y = next(p[0, 1] for p in paths(svg, "muted", dashed=True) if len(p) == 2)
    (line,) = [p for p in paths(svg, "blue", dashed=False) if len(p) > 20]
    scale = math.log(1_472 / 64) / (training_y - batch_y)
    drawn = 64 * np.exp((line[:, 1] - batch_y) * scale)
    measured = [r for r in step_records(run_info()) if r.reading and r.reading.state in ("resolved", "wide")]
    per_epoch = (line[-1, 0] - line[0, 0]) / (measured[-1].epoch - measured[0].epoch)
    epochs = measured[0].epoch + (line[:, 0] - line[0, 0]) / per_epoch
    for epoch, value in zip(epochs, drawn, strict=True):
        record = measured[round(epoch * 23) - measured[0].step]
        assert record.reading is not None
        assert value == pytest.approx(record.reading.noise_scale, rel=0.01)


def test_all_figures_are_there_and_legends_say_what_is_drawn(page: Path) -> None:
    root = parse(page)
    titles = [words(each.find("h2")) for each in root.iter("figure")]  # type: ignore[arg-type]
    first = ["Gradient noise scale", "Loss", "Accuracy", "Where the time of a step went", "Learning rate"]
    assert titles == [*first, "Gap between training and validation"]
    legend = [words(item) for item in figure(root, "Gradient noise scale").iter("li")]
    assert legend == [
        *("noise scale", "95 % interval", "lower bound only", "unresolved"),
        *("global batch size 64", "training set 1,472"),
    ]
    phases = [words(item) for item in figure(root, "Where the time of a step went").iter("li")]
    assert phases == ["data", "forward", "backward", "all-reduce", "wait", "optimizer"]


def test_bars_are_as_long_as_the_mean_times(page: Path) -> None:
    svg = next(figure(parse(page), "Where the time of a step went").iter(f"{SVG}svg"))
    fills = [p for p in svg.iter(f"{SVG}path") if "fill: var(--" in p.get("style", "") and p.get("clip-path")]
    widths = [np.ptp(np.array(re.findall(r"[ML] (\S+) (\S+)", p.get("d", "")), dtype=float)[:, 0]) for p in fills]
    records = step_records(run_info())
    means = [
        sum(record.phase_seconds[rank][phase] for record in records)
        for phase in ("data", "forward", "backward", "all_reduce", "wait", "optimizer")
        for rank in (0, 1)
    ]
    assert len(widths) == 12
    assert np.array(widths) / sum(widths) == pytest.approx(np.array(means) / sum(means), abs=1e-4)


def test_user_written_strings_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    hostile = '<script>alert("$x_1$")</script>&'
    info = replace(run_info(), task=hostile, metric=hostile, transport=hostile)
    recorder = Recorder(tmp_path / "run.db", info)
    for record in step_records(info, 30):
        recorder.step(record)
    for record in evaluation_records(info, 30):
        recorder.evaluation(replace(record, metrics={hostile: 0.5}))
    recorder.close()
    (tmp_path / "job.toml").write_text("# </pre>" + hostile)
    path = write_report(tmp_path)
    root, text = parse(path), path.read_text()
    assert not list(root.iter("script"))
    assert words(next(root.iter("pre"))) == "# </pre>" + hostile
    assert "<script" not in text
    for element in root.iter():
        for name, value in element.attrib.items():
            if name in (XLINK, "href", "src", "srcset", "data", "action"):
                assert value.startswith("#"), (element.tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text


def test_a_run_in_progress_and_one_that_has_only_begun(tmp_path: Path) -> None:
    info = run_info()
    recorder = Recorder(tmp_path / "run.db", info, interval_seconds=0.01)
    page = retry_until_recorded(tmp_path)
    assert "No step is recorded yet." in words(parse(page))
    feed(recorder, info, last_step=20)
    recorder.close()
    text = words(parse(write_report(tmp_path)))
    assert "Step 20 of 276, epoch 0.9." in text
    assert "unresolved" in text


def retry_until_recorded(directory: Path) -> Path:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        try:
            return write_report(directory)
        except UsageError:
            time.sleep(0.02)
    pytest.fail("the recorder never began")


def test_a_run_without_noise_scale_metrics_or_finite_losses(tmp_path: Path) -> None:
    info = replace(run_info(), target=None)
    recorder = Recorder(tmp_path / "run.db", info)
    for record in step_records(info, 5):
        recorder.step(replace(record, noise=None, loss=math.nan, phase_seconds=()))
    recorder.close()
    root = parse(write_report(tmp_path))
    assert [words(each.find("h2")) for each in root.iter("figure")] == ["Loss", "Learning rate"]  # type: ignore[arg-type]


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    info = run_info(epochs=400)
    page = write_report(record_run(tmp_path, info))
    points = max(len(each) for each in paths(parse(page), "blue"))
    assert points <= DRAWN_STEPS * 1.5
    assert page.stat().st_size < 2_000_000
    assert "Step 9,200 of 9,200" in words(parse(page))


def test_a_resumed_run_says_so(tmp_path: Path) -> None:
    record_run(tmp_path, run_info(), last_step=60)
    record_run(tmp_path, run_info(start_step=46, restarts=1))
    assert "Step 276 of 276, epoch 12. Resumed from step 46." in words(parse(write_report(tmp_path)))


def test_a_card_says_above_the_charts_that_there_are_warnings() -> None:
    said = [
        RunEvent(step, 1.0, "warning", -1, Finding(title, "and why").sentence)
        for step, title in ((1, "a"), (9, "dead"))
    ]
    cards = health_cards([run_info()], None, said, None)
    assert [(card.title, card.value, card.detail) for card in cards] == [
        ("Warnings", "2", "the latest: dead; all are below")
    ]
    assert health_cards([run_info()], None, [], None) == []


def test_running_mean_against_a_loop() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0, np.nan, np.nan, np.nan])
    expected = [np.nanmean(values[max(0, i - 2) : i + 1]) for i in range(7)]
    assert running_mean(values, 3)[:7] == pytest.approx(expected)
    assert math.isnan(running_mean(values, 3)[7])


def test_what_cannot_be_reported_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no record of a run here"):
        write_report(tmp_path)
    (tmp_path / "other").mkdir()
    other = record_run(tmp_path / "other", run_info(), last_step=5)
    (tmp_path / "run.db").symlink_to(other / "run.db")
    with pytest.raises(UsageError, match="run.db is a link, which is not followed"):
        write_report(tmp_path)
    (tmp_path / "run.db").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(UsageError, match="report.html: not written, the directory belongs to user"):
            write_report(other)
    assert not (other / "report.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=re.escape("pip install -e '.[report]'")):
        write_report(record_run(tmp_path, run_info(), last_step=5))


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that lets nothing through and notes what it was asked for."""
    asked: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_GET = do_CONNECT = do_POST = refuse  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("recorded", ["page", "adam_page"])
def test_a_browser_draws_it_without_network(
    recorded: str, request: pytest.FixtureRequest, proxy: tuple[str, list[str]], tmp_path: Path
) -> None:
    page: Path = request.getfixturevalue(recorded)
    address, asked = proxy
    document = drawn(page, tmp_path / "profile", f"--proxy-server={address}", "--window-size=1280,1000")
    assert document.count("<figure") == 5 + ("Gap between" in document)
    assert recorded != "page" or html.escape("<b>digits & co</b>", quote=False) in document
    assert [url for url in asked if "google" not in url and "gvt1" not in url] == []
