"""Texts and errors that ranks share."""

from __future__ import annotations

from typing import Any

import pytest

from ddp import errors
from ddp.errors import CheckpointError, DdpError, UsageError
from ddp.training.agreement import from_rank_zero, gather_texts, together
from ranks import RankPool, process_group


class PrivateError(DdpError):
    """Not one that `ddp.errors` names."""


def _texts(rank: int, world_size: int, store_address: str, texts: list[str]) -> tuple[list[str], str]:
    with process_group(rank, world_size, store_address):
        return gather_texts(texts[rank]), from_rank_zero(texts[rank])


@pytest.mark.parametrize(
    "texts",
    [
        ["only"],
        ["", ""],
        ["", "a", ""],
        ["\0", "", "line one\nline two", "größer 寸 🏖"],
        ["name \udcff of a file", "x" * 70_001],  # a name that is not UTF-8, as os.fsdecode gives it
    ],
)
def test_every_text_arrives_whole_on_every_rank(rank_pool: RankPool, texts: list[str]) -> None:
    assert rank_pool.run(len(texts), _texts, texts) == [(texts, texts[0])] * len(texts)


def _together(rank: int, world_size: int, store_address: str, failing: dict[int, str]) -> list[Any]:
    def action() -> int:
        if rank in failing:
            kind = PrivateError if failing[rank] == "PrivateError" else getattr(errors, failing[rank])
            raise kind(f"from rank {rank}\nwith a second line")
        return 10 * rank

    with process_group(rank, world_size, store_address):
        try:
            outcome: Any = together(action)
        except DdpError as error:
            outcome = (type(error).__name__, str(error), error.exit_code)
        return [outcome, together(lambda: rank)]  # nobody is left behind in the first one


def test_without_an_error_each_rank_gets_its_own_result(rank_pool: RankPool) -> None:
    assert rank_pool.run(3, _together, {}) == [[0, 0], [10, 1], [20, 2]]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kind", [UsageError, CheckpointError])
def test_an_error_of_one_rank_is_raised_on_all(rank_pool: RankPool, rank: int, kind: type[DdpError]) -> None:
    outcomes = rank_pool.run(3, _together, {rank: kind.__name__})
    expected = (kind.__name__, f"from rank {rank}\nwith a second line", kind.exit_code)
    assert [outcome for outcome, _ in outcomes] == [expected] * 3
    assert [after for _, after in outcomes] == [0, 1, 2]


def test_of_several_errors_all_ranks_take_the_first(rank_pool: RankPool) -> None:
    outcomes = rank_pool.run(4, _together, {1: "UsageError", 3: "TransportError"})
    assert [outcome for outcome, _ in outcomes] == [("UsageError", "from rank 1\nwith a second line", 2)] * 4


def test_an_error_that_has_no_name_here_keeps_its_message(rank_pool: RankPool) -> None:
    (_, _), (outcome, _) = rank_pool.run(2, _together, {0: "PrivateError"})
    assert outcome == ("DdpError", "from rank 0\nwith a second line", 1)
