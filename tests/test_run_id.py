from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ddp.errors import UsageError
from ddp.job import RUN_ID, generate_run_id, resolve_run_id

WHEN = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
ALL = {"DDP_RUN_ID": "launched", "SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "elastic"}


def test_who_says_it_first() -> None:
    assert resolve_run_id("own", ALL, "new") == "own"
    assert resolve_run_id(None, ALL, "new") == "launched"
    assert resolve_run_id(None, {**ALL, "DDP_RUN_ID": ""}, "new") == "4711"
    assert resolve_run_id(None, {"TORCHELASTIC_RUN_ID": "elastic"}, "new") == "elastic"
    assert resolve_run_id(None, {"TORCHELASTIC_RUN_ID": "none"}, "new") == "new"


@pytest.mark.parametrize("value", ["../up", "a/b", "..", ".hidden", "x" * 65])
def test_a_variable_that_cannot_name_a_directory(value: str) -> None:
    with pytest.raises(UsageError, match="DDP_RUN_ID: .*run id"):
        resolve_run_id(None, {"DDP_RUN_ID": value}, "new")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("digits", "digits-20310203-040506-beef"),
        ("my job/é", "my-job--20310203-040506-beef"),
        ("../..", "run-20310203-040506-beef"),
        ("", "run-20310203-040506-beef"),
        ("x" * 80, "x" * 43 + "-20310203-040506-beef"),
    ],
)
def test_a_generated_id_is_valid(name: str, expected: str) -> None:
    generated = generate_run_id(name, WHEN, "beef")
    assert RUN_ID.fullmatch(generated)
    assert generated == expected
