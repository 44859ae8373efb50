from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

from ddp import outcome
from ddp.errors import CheckpointError, DivergedError, PeerLostError, StoppedError
from ddp.outcome import Outcome

HERE = socket.gethostname()


def test_a_failure_says_where_it_was(tmp_path: Path) -> None:
    error = DivergedError("not finite")
    outcome.annotate(error, step=12, run_directory=tmp_path)
    outcome.annotate(error, step=99)
    assert outcome.failure(error, 1, 3) == Outcome(3, 1, 3, HERE, 12, "not finite")
    assert outcome.failure(error, 1, 3).message() == f"error: rank 1 on {HERE}, step 12: not finite"
    assert outcome.failure(ValueError("seven"), 0, 1).message() == "error: ValueError: seven"
    assert outcome.failure(KeyboardInterrupt(), 0, 1).cause == "KeyboardInterrupt"


def test_the_first_cause_wins_over_later_ones_and_over_what_follows_from_it(tmp_path: Path) -> None:
    file = tmp_path / outcome.FILE_NAME
    lost = outcome.failure(PeerLostError("rank 1 died"), 0, 3)
    first, second = outcome.failure(ValueError("1"), 1, 3), outcome.failure(ValueError("2"), 2, 3)
    assert outcome.claim(file, outcome.success(0, 3))
    assert outcome.claim(file, lost)
    assert not outcome.claim(file, outcome.failure(PeerLostError("rank 1 died"), 2, 3))
    assert outcome.claim(file, first)
    assert not outcome.claim(file, second)
    assert not outcome.claim(file, lost)
    assert outcome.read(file) == first
    assert [each.name for each in tmp_path.iterdir()] == [outcome.FILE_NAME]
    outcome.clear(tmp_path)
    assert outcome.read(file) is None


def test_what_follows_from_another_rank_gives_way_to_it(tmp_path: Path) -> None:
    cause, follows = CheckpointError("this disk is full"), CheckpointError("another rank could not")
    follows.consequence = True
    lost = PeerLostError("rank 0 left")
    assert [outcome.failure(each, 1, 2).weight for each in (follows, lost, cause, StoppedError("x"))] == [1, 1, 2, 2]
    assert not outcome.failure(cause, 1, 2).consequence
    file = tmp_path / outcome.FILE_NAME
    assert outcome.claim(file, outcome.failure(follows, 1, 2))
    assert outcome.claim(file, outcome.failure(cause, 0, 2))
    held = outcome.read(file)
    assert held is not None and (held.rank, held.cause) == (0, "this disk is full")


def test_what_is_no_outcome_reads_as_none(tmp_path: Path) -> None:
    file = tmp_path / outcome.FILE_NAME
    for text in ("", "[]", "{}", '{"code": "0"}', "\udcff"):
        file.write_text(text, errors="surrogateescape")
        assert outcome.read(file) is None


def test_ranks_claim_at_once_and_one_wins(tmp_path: Path) -> None:
    file = tmp_path / outcome.FILE_NAME
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        won = pool.starmap_async(_claim, [(file, rank) for rank in range(4)]).get(30)
        pool.close()
        pool.join()
    winner = outcome.read(file)
    assert won.count(True) == 1
    assert winner is not None
    assert won[winner.rank]


def _claim(file: Path, rank: int) -> bool:
    assert outcome.meet(file, rank, 4, 20)
    return outcome.claim(file, outcome.failure(ValueError(str(rank)), rank, 4))


def test_meeting_takes_everyone(tmp_path: Path) -> None:
    file = tmp_path / outcome.FILE_NAME
    assert not outcome.meet(file, 1, 2, 0.05)
    assert outcome.meet(file, 0, 2, 0.05)


def test_what_is_no_outcome_is_none(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "outcome.json", tmp_path / "elsewhere.json"
    outcome.claim(elsewhere, outcome.success(0, 1))
    path.symlink_to(elsewhere)
    assert outcome.read(path) is None
    assert outcome.claim(path, outcome.success(1, 2)) and not path.is_symlink()
    good = json.loads(elsewhere.read_text())
    for change in ({"code": True}, {"step": 1.0}, {"host": None}, {"more": 1}):
        path.write_text(json.dumps({**good, **change}))
        assert outcome.read(path) is None
    for text in ("[" * 100_000, "9" * 6000, "", "\0"):
        path.write_text(text)
        assert outcome.read(path) is None
    path.unlink()
    os.mkfifo(path)
    assert outcome.read(path) is None
