"""Three cases of every row of `make soak`: each fault is injected for real, and the run does what the README says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from faults.rows import ROWS
from faults.verdict import Row, UnexpectedError, dealt

SEED, CASES = 0, 3


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases have their folders: they share the runs that nobody disturbs."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    "row, case",
    [
        pytest.param(row, case, id=f"{row.name}-{index}")
        for row in ROWS
        for index, case in enumerate(row.cases(SEED, CASES))
    ],
)
def test_a_run_survives(row: Row, case: Any, beside: Path, request: pytest.FixtureRequest) -> None:
    hindrance = row.hindrance()
    if hindrance is not None:
        pytest.fail(hindrance) if os.environ.get("CI") == "true" else pytest.skip(hindrance)
    verdict = row.run(case, beside / request.node.callspec.id)
    assert verdict.ok, verdict.what


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_cases_depend_on_the_seed_alone_and_fewer_are_the_beginning_of_more(row: Row) -> None:
    assert row.cases(1, 12) == row.cases(1, 12)
    assert row.cases(1, 12) != row.cases(2, 12)
    assert len(set(row.cases(1, CASES))) == CASES
    assert len(row.cases(1, row.soak_cases)) == row.soak_cases


def test_each_kind_comes_once_before_any_comes_again() -> None:
    import random

    drawn = dealt(random.Random(5), "abcde", 12)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list("abcde")
    assert len(drawn) == 12


def test_a_run_that_breaks_its_promise_is_a_failed_verdict(tmp_path: Path) -> None:
    def check(case: str, folder: Path) -> tuple[float, str]:
        raise UnexpectedError(f"{folder.name} went wrong")

    row = Row("name", "fault", "promise", 1, lambda _, count: ["case"] * count, check)
    verdict = row.run("case", tmp_path / "here")
    assert not verdict.ok
    assert verdict.what == "case: here went wrong"
