"""Findings against the trials they were made from; the page against the findings; and in a real browser."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from browser import drawn
from ddp.errors import DdpError, UsageError
from ddp.search.critical_batch_charts import pareto_front
from ddp.search.critical_batch_report import render, write_critical_batch_report
from ddp.search.findings import Finding, as_json, findings, mean_over_seeds, read_findings, write_result
from ddp.search.findings_text import in_words
from ddp.search.store import FILE_NAME, read_trials
from ddp.telemetry.critical_batches import read_critical_batches
from search_trials import SIZES, simulated_trials, store

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGD whose both targets are bracketed, Adam whose second is not, and branched runs; and a name to escape."""
    directory = tmp_path_factory.mktemp("runs") / "a <b> & c"
    directory.mkdir()
    return store(
        directory,
        simulated_trials(),
        simulated_trials(optimizer="adam", critical=(150.0, 4000.0), seed=1),
        simulated_trials(method="branched", critical=(70.0,), targets=(0.5,), seed=2),
        simulated_trials(method="pilot", sizes=(64,), seed=3),
    )


@pytest.fixture(scope="module")
def found(search: Path) -> dict[tuple[str, str, float], Finding]:
    return {(each.optimizer, each.method, each.target): each for each in read_findings(search)}


def value(finding: Finding) -> float:
    assert finding.fit.critical_batch_size is not None
    return finding.fit.critical_batch_size.value


def test_each_optimizer_method_and_target_has_its_own_value(found: dict[tuple[str, str, float], Finding]) -> None:
    assert set(found) == {
        ("sgd", "sweep", 1.0),
        ("sgd", "sweep", 0.5),
        ("adam", "sweep", 1.0),
        ("adam", "sweep", 0.5),
        ("sgd", "branched", 0.5),
    }
    assert value(found["sgd", "sweep", 1.0]) == pytest.approx(20, rel=0.1)
    assert value(found["sgd", "sweep", 0.5]) == pytest.approx(60, rel=0.1)
    assert value(found["adam", "sweep", 1.0]) == pytest.approx(150, rel=0.1)
    assert value(found["sgd", "branched", 0.5]) == pytest.approx(70, rel=0.1)
    assert "larger ones are needed" in found["adam", "sweep", 0.5].fit.reason


def test_what_stands_beside_the_value(found: dict[tuple[str, str, float], Finding]) -> None:
    finding = found["adam", "sweep", 1.0]
    assert [row.batch_size for row in finding.rows] == list(SIZES)
    row = finding.rows[4]
    assert row.validation_loss.value == pytest.approx(1 + 0.02 * 6 + 0.001)
    assert row.seconds_per_step == pytest.approx(1e-3 + 64e-5)
    assert row.peak_memory_bytes == 200 * 2**20 + 2**16 * 64
    assert row.examples.value == pytest.approx(64 * row.best.steps.value)
    assert finding.predicted_plain is not None and finding.predicted_plain.value == pytest.approx(0.8 * 150)
    assert finding.predicted_preconditioned is not None
    assert finding.predicted_preconditioned.value == pytest.approx(1.1 * 150)
    assert found["sgd", "sweep", 1.0].predicted_preconditioned is None
    assert len(finding.learning_rates) == 6 * len(SIZES)
    assert sum(math.isnan(steps) for _, _, steps in finding.learning_rates) == len(SIZES)


def test_words(found: dict[tuple[str, str, float], Finding]) -> None:
    text = in_words(found["sgd", "sweep", 0.5])
    assert re.match(r"SGD to training loss 0\.5: the critical batch size is 5\d|6\d \[", text)
    assert "predicted 48 [48, 48] (plain), 0.8" in text
    assert "the hyperbola holds" in text
    assert re.search(
        r"The largest batch that does no harm is (8|16) \(examples to the target shown to be at most 1\.25 times those at 4\)",
        text,
    )
    refused = in_words(found["adam", "sweep", 0.5])
    assert "no critical batch size, because" in refused
    assert "hyperbola" not in refused


def test_few_steps_are_said() -> None:
    trials = list(simulated_trials(critical=(20.0,), targets=(1.0,)))
    assert "fewer than 30" not in in_words(findings(trials)[0])
    quick = [replace(each, steps_to_target=(0.3 * each.steps_to_target[0],)) for each in trials]
    (finding,) = findings(quick)
    assert finding.fit.critical_batch_size is None
    assert as_json(finding)["critical_batch_size"] is None
    reason = "a huge batch would get there in 24.2 steps, fewer than 30: a lower target is needed"
    assert f"no critical batch size, because {reason}." in in_words(finding)
    page = render([finding], [], "name", 0.0)
    assert re.search(rf"no value\W.*{reason}", page, re.DOTALL)
    branches = [replace(each, method="branched", origin="/run") for each in quick]
    assert findings(branches)[0].fit.critical_batch_size is not None


def test_one_seed_gives_no_value() -> None:
    """No interval can be had from it: the words say so, and the table does not show one of zero width."""
    alone = [each for each in simulated_trials(critical=(20.0,), targets=(1.0,)) if each.seed == 0]
    (finding,) = findings(alone)
    assert finding.fit.critical_batch_size is None
    assert "was run with one seed only at batch sizes 4, 8" in finding.fit.reason
    assert all(math.isnan(row.best.steps.low) and math.isnan(row.best.steps.high) for row in finding.rows)
    assert finding.harmless is not None
    assert {each.verdict for each in finding.harmless.comparisons} == {"undecided"}
    assert "? to ?" in render([finding], [], "name", 0.0)


def test_a_trial_that_was_killed_takes_no_part() -> None:
    """Neither in the fit nor beside it: seed 1 of each of the best learning rates was killed."""
    whole = list(simulated_trials())
    unknown = (math.nan,) * 2
    dead = {"steps_to_target": unknown, "noise_plain": unknown, "validation_loss_at_target": unknown}
    cut = [
        replace(trial, stopped_because="failed", seconds_per_step=math.nan, curve=(), **dead)  # type: ignore[arg-type]
        if trial.seed == 1 and trial.learning_rate == pytest.approx(0.5 / (1 + 60 / trial.batch_size))
        else trial
        for trial in whole
    ]
    killed = sum(trial.stopped_because == "failed" for trial in cut)
    (_, one), (_, other) = findings(whole), findings(cut)
    assert killed == len(one.rows) and other.runs == one.runs - killed
    assert other.fit.critical_batch_size is not None
    for row in other.rows:
        assert math.isfinite(row.noise_plain + row.seconds_per_step + row.validation_loss.value)
    assert other.predicted_plain is not None and other.predicted_plain.value == pytest.approx(48)


def test_a_full_disk_is_not_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = simulated_trials()
    path = store(tmp_path, iter([first])) / FILE_NAME
    connect = sqlite3.connect

    def on_a_full_disk(*args: Any, **keywords: Any) -> sqlite3.Connection:
        database = connect(*args, **keywords)
        database.execute("PRAGMA max_page_count = 1")  # at most as many as there are
        return database

    monkeypatch.setattr(sqlite3, "connect", on_a_full_disk)
    with pytest.raises(DdpError, match="database or disk is full; the trials that finished before are kept") as raised:
        store(tmp_path, iter(others))
    assert raised.value.exit_code == 1
    kept = read_trials(path)
    assert (kept[0].batch_size, kept[0].steps_to_target) == (first.batch_size, first.steps_to_target)
    assert len(kept) < 1 + len(others)


def test_the_result_is_what_the_metrics_read(search: Path, found: dict[tuple[str, str, float], Finding]) -> None:
    path = write_result(search)
    assert path.name == "result.json"
    read = {(each.optimizer, each.method, each.target): each for each in read_critical_batches(str(path))}
    assert len(read) == 4  # without the one that has no value
    for (optimizer, method, target), entry in read.items():
        estimate = found[optimizer, method, float(target.removeprefix("loss "))].fit.critical_batch_size
        assert estimate is not None
        assert (entry.critical_batch_size, entry.low, entry.high) == (estimate.value, estimate.low, estimate.high)
    (refused,) = [each for each in json.loads(path.read_text()) if each["critical_batch_size"] is None]
    assert "larger ones are needed" in refused["fit"]["reason"]
    assert len(refused["rows"]) == len(SIZES)


def test_mean_over_seeds_against_scipy() -> None:
    from scipy import stats

    values = [0.3, 0.31, 0.35, 0.29]
    low, high = stats.t.interval(0.95, 3, loc=fmean(values), scale=stdev(values) / 2)
    found = mean_over_seeds(values)
    assert (found.value, found.low, found.high) == pytest.approx((fmean(values), low, high))
    assert math.isinf(mean_over_seeds([0.3]).high)
    assert math.isnan(mean_over_seeds([0.3, math.nan]).low)


def test_the_pareto_front_against_all_pairs() -> None:
    cost, time = np.random.default_rng(0).integers(1, 12, (2, 40)).astype(float)
    front = pareto_front(cost, time)
    expected = {
        (c, t)
        for c, t in zip(cost, time, strict=True)
        if not any((a <= c and b <= t and (a, b) != (c, t)) for a, b in zip(cost, time, strict=True))
    }
    points = [(cost[i], time[i]) for i in front]
    assert set(points) == expected
    assert points == sorted(points)


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(search: Path) -> Path:
    return write_critical_batch_report(search)


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def parse(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))


def test_the_page_says_what_was_found(page: Path, found: dict[tuple[str, str, float], Finding]) -> None:
    root = parse(page)
    paragraphs = [words(each) for each in root.iter("p")]
    cards = [words(each) for each in root.iter("div") if each.get("class") == "card"]
    assert len(cards) == len(found)
    for finding in found.values():
        assert " ".join(in_words(finding).split()) in paragraphs
    assert sum("no value" in card for card in cards) == 1
    rows = [[words(cell) for cell in row.iter("td")] for row in root.iter("tr") if row.find("td") is not None]
    assert len(rows) == len(SIZES) * len(found)
    assert root.find("head/title").text == "a <b> & c"  # type: ignore[union-attr]


def test_the_fitted_line_is_the_hyperbola(page: Path, found: dict[tuple[str, str, float], Finding]) -> None:
    """Of the branched runs, which come first and have one target. The axis is known from the drawn points; along the line, steps are then S_min (1 + B_crit/B)."""
    finding = found["sgd", "branched", 0.5]
    first = next(each for each in parse(page).iter("figure") if words(each.find("h2")) == "Steps to the target")  # type: ignore[arg-type]
    svg = next(first.iter(f"{SVG}svg"))
    points = uses(svg)
    line = next(path for path in paths(svg) if len(path) > 15)
    x_of = np.polyfit(np.log(SIZES), points[:, 0], 1)
    y_of = np.polyfit(np.log([row.best.steps.value for row in finding.rows]), points[:, 1], 1)
    sizes = np.exp((line[:, 0] - x_of[1]) / x_of[0])
    assert finding.fit.smallest_steps is not None
    expected = finding.fit.smallest_steps.value * (1 + value(finding) / sizes)
    assert np.exp((line[:, 1] - y_of[1]) / y_of[0]) == pytest.approx(expected, rel=0.01)


def uses(svg: ElementTree.Element) -> np.ndarray:
    """Places of the blue markers."""
    found = [each for each in svg.iter(f"{SVG}use") if "--blue" in each.get("style", "")]
    return np.array([(float(each.get("x", "nan")), float(each.get("y", "nan"))) for each in found])


def paths(svg: ElementTree.Element) -> list[np.ndarray]:
    stroked = [each for each in svg.iter(f"{SVG}path") if "stroke: var(--blue)" in each.get("style", "")]
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", each.get("d", "")), dtype=float) for each in stroked]


def test_a_search_that_has_just_begun(tmp_path: Path) -> None:
    """Runs at two batch sizes, all of them failed at the first: a page, and the reason in words."""
    with pytest.raises(UsageError, match="no trial has finished yet"):
        write_critical_batch_report(tmp_path)
    store(tmp_path, (each for each in simulated_trials(sizes=(64,)) if each.diverged))
    text = words(parse(write_critical_batch_report(tmp_path)))
    assert (
        "no critical batch size, because no batch size reached the target with all its seeds: a higher target" in text
    )
    assert "only 0" not in text
    store(tmp_path, simulated_trials(sizes=(8,)))
    assert "only 1 batch size" in words(parse(write_critical_batch_report(tmp_path)))


def test_without_matplotlib(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=re.escape("pip install -e '.[report]'")):
        write_critical_batch_report(search)


def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    document = drawn(page, tmp_path / "profile")
    assert document.count("<figure") == 27
    assert "<b> & c" not in document
