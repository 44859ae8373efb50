"""The benchmark of the all-reduce: that its one command still runs, and how it comes to its ratios."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import python, run_command
from mpi_environments import ROOT, mpi_environment

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def all_reduce(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("all_reduce")


def test_ratios_are_taken_within_a_start_and_peers_count_with_their_better_level(all_reduce: Any) -> None:
    def start(mpi: str, level: str, **seconds: float) -> Any:
        return all_reduce.Start(mpi, level, {"4KiB": {name.replace("_", " "): each for name, each in seconds.items()}})

    starts = [
        start("openmpi", "funneled", in_place=1.0, ours=2.0, Open_MPI=9.0, Gloo=30.0),
        start("mpich", "funneled", in_place=4.0, ours=8.0, MPICH=36.0),  # the machine was slower here
        start("openmpi", "multiple", in_place=1.0, ours=2.0, Open_MPI=12.0, Gloo=32.0),
        start("mpich", "multiple", in_place=1.0, ours=2.0, MPICH=7.0),
    ]
    assert all_reduce.ratio(starts, "4KiB", "ours", "in place") == 2.0
    assert all_reduce.ratio(starts, "4KiB", "Open MPI", "ours") == 4.5
    assert all_reduce.verdict(starts, "4KiB") == "3.50 (MPICH)"
    assert all_reduce.figure(starts, "4KiB", "MPICH") == 7.0
    assert all_reduce.figure(starts, "4KiB", "DeepSpeed") is None
    assert all_reduce.bytes_of("1.5MiB") == 3 << 19


def test_one_command_measures_everyone(tmp_path: Path) -> None:
    mpi_environment("mpich")  # skips, or fails, where there is none
    options = [
        "--sizes",
        "4KiB",
        "--seconds",
        "0.001",
        "--levels",
        "multiple",
        "--busy-neighbour",
        "--json",
        "out.json",
    ]
    ended = run_command(python(str(BENCHMARKS / "all_reduce.py"), "--ranks", "3", *options), tmp_path)
    assert ended.code == 0, ended
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    measured = {start["mpi"]: set(start["seconds"]["4KiB"]) for start in case["starts"]}
    assert {"in place", "copy", "ours", "Gloo", "Open MPI", "ours busy"} <= measured["openmpi"]
    assert {"in place", "copy", "ours", "MPICH", "MPICH busy"} <= measured["mpich"]
    assert all(seconds > 0 for start in case["starts"] for seconds in start["seconds"]["4KiB"].values())
    assert "3 ranks" in ended.stdout and "best peer / ours, busy" in ended.stdout
