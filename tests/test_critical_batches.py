"""A result of runs that a job names: what is read of it, and what is said where it cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ddp.errors import UsageError
from ddp.telemetry.critical_batches import CriticalBatch, read_critical_batches

ENTRY = {"method": "sweep", "optimizer": "adam", "target": "loss 0.3", "critical_batch_size": 147, "low": 1, "high": 2}


def test_what_runs_measured_is_read_and_what_they_did_not_bracket_is_nan(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    second_entry = {**ENTRY, "method": "branched", "low": None, "high": math.inf}
    unknown, earlier = {**ENTRY, "target": "loss 0.1", "critical_batch_size": None}, {**ENTRY, "critical_batch_size": 3}
    path.write_text(json.dumps([earlier, {**ENTRY, "seeds": 3}, unknown, second_entry]))
    first, second = read_critical_batches(str(path))
    assert first == CriticalBatch("sweep", "adam", "loss 0.3", 147.0, 1.0, 2.0)
    assert (second.method, math.isnan(second.low), second.high) == ("branched", True, math.inf)
    assert read_critical_batches(None) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("{}", "which is a list"),
        (json.dumps([ENTRY, {**ENTRY, "low": "many"}]), "entry 2: .*'many' is not a number"),
        (json.dumps([{key: value for key, value in ENTRY.items() if key != "target"}]), "entry 1: .*'target'.*needs"),
        (json.dumps([7]), "entry 1: "),
    ],
)
def test_a_bad_result_is_refused_with_its_path(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"critical_batch_result: {path}: .*{said}|{path}: {said}"):
        read_critical_batches(str(path))


def test_a_result_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.json: cannot read it: No such file.*ddp critical-batch"):
        read_critical_batches(str(tmp_path / "nowhere.json"))
