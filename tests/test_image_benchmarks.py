"""The benchmarks on images: that each one's command still runs, and what it makes of its figures."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp.tasks.idx import read_idx
from jobs import python, run_command
from mpi_environments import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("letters")


def test_images_a_second_are_measured(tmp_path: Path) -> None:
    options = ["--ranks", "2", "--size", "64", "--examples", "1", "--rounds", "1", "--json", "out.json"]
    ended = run_command(python(str(BENCHMARKS / "images.py"), *options), tmp_path)
    assert ended.code == 0, ended
    figures = json.loads((tmp_path / "out.json").read_text())["ranks"]
    training, inference = figures["2"]["training"], figures["2"]["inference"]
    assert training["seconds"] > 0 and training["matrix_rate"] > 1e8
    assert 2.5 < training["operations"] / inference["operations"] < 3.0
    assert inference["operations"] == pytest.approx(
        2 * 1.814e9 * (64 / 224) ** 2, rel=0.02
    )  # the published 1.814e9 at 224x224, by area
    assert "ResNet-18 on images of 64x64" in ended.stdout and "of the matrix rate" in ended.stdout


def test_the_letters_are_real_handwriting_turned_and_shifted(letters: Any, tmp_path: Path) -> None:
    letters.write_letters(tmp_path)
    images, labels = (
        read_idx(tmp_path / f"t10k-{name}-ubyte", dimensions)
        for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    assert images.shape == (1300, 28, 28) and np.array_equal(labels[:325], labels[325:650])
    assert not np.array_equal(images[0], images[325])


def test_the_practitioners_case_runs_from_end_to_end(tmp_path: Path) -> None:
    options = ["--target", "0.15", "--seeds", "1", "--find-steps", "20", "--limit", "0.5"]
    options += ["--pace-steps", "0", "--json", "out.json"]
    ended = run_command(python(str(BENCHMARKS / "letters.py"), *options), tmp_path, timeout=240.0)
    assert ended.code == 0, ended
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert len(rows) == 8 and rows["Adam, found rate, advised batch"]["ranks"] == 2
    assert rows["Adam, torch's rate"]["answers"][0]["accuracy"] >= 0.15
    assert rows["SGD, torch's rate"]["answers"][0]["cpu"] > 0
    assert "| Adam, torch's rate | 1 | 32 | 0.001 |" in ended.stdout


def test_factors_are_of_medians_and_of_what_was_reached(letters: Any) -> None:
    def row(name: str, *seconds: float, reached: float = 1.0) -> Any:
        answers = [
            {"cpu": each, "wall": 2 * each, "reached": reached, "steps": 10, "examples": 320, "learning_rate": 1e-3}
            for each in seconds
        ]
        return letters.Row(name, 1, 32, answers)

    slow, quick, never = row("slow", 50, 90, 70), row("quick", 7, 3, 5), row("never", 600, reached=0.0)
    assert letters._line(quick, slow)[-2:] == ["14.0", "14.0"]
    assert letters._line(quick, never)[-1] == "> 120.0"
    assert letters._line(never, slow)[-4:] == ["> 600.00 s", "> 1200.00 s", "not reached", "not reached"]
    shown = letters.show([slow, quick], argparse.Namespace(path=None, target=0.8, seeds=3))
    assert "| slow | 1 | 32 | 0.001 | 10 | 320 | 70.00 s | 140.00 s | 1.0 | 1.0 |" in shown


def test_efficiency_is_told_for_each_batch(letters: Any) -> None:
    found = [{"batch": 32, "alone": 4.0, "together": 2.5, "efficiency": 0.8}]
    arguments = argparse.Namespace(ranks=2, pace_steps=150, pace_rounds=3)
    assert "| 32 | 4.00 s | 2.50 s | 0.80 |" in letters.show_efficiency(found, arguments)


def test_the_advised_batch_is_one_that_the_ranks_can_share(letters: Any) -> None:
    assert letters.advised_batch([90.0, math.nan, 141.5, 100.0], 2) == 100
    assert letters.advised_batch([101.0], 2) in (100, 102)
    assert letters.advised_batch([0.2], 4) == 4
    assert letters.advised_batch([math.nan], 2) == letters.BATCH
