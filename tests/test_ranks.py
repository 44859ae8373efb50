"""The tests' own way to run ranks: results in order, failures told, nothing left running."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from ranks import RankFailure, RankPool, connect_store, process_group, run_ranks


def _who(rank: int, world_size: int, store_address: str, word: str) -> tuple[int, int, str, int]:
    return rank, world_size, word, os.getpid()


def _all_reduce(rank: int, world_size: int, store_address: str, size: int) -> torch.Tensor:
    with process_group(rank, world_size, store_address):
        tensor = torch.arange(size, dtype=torch.float64) * (rank + 1)
        torch.distributed.all_reduce(tensor)
        return tensor


def _pass_on(rank: int, world_size: int, store_address: str) -> str:
    store = connect_store(store_address)
    store.set(f"from {rank}", f"word {rank}")
    return store.get(f"from {(rank + 1) % world_size}").decode()


def _fail_on(rank: int, world_size: int, store_address: str, failing: int, how: str) -> int:
    if rank == failing:
        match how:
            case "raise":
                raise ValueError(f"no luck on {rank}")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
            case "warn":
                warnings.warn("careful", stacklevel=1)
    return os.getpid()


def _environment(rank: int, world_size: int, store_address: str, name: str) -> tuple[str | None, str | None]:
    return os.environ.get(name), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_in_rank_order(rank_pool: RankPool, world_size: int) -> None:
    results = rank_pool.run(world_size, _who, "hello")
    assert [result[:3] for result in results] == [(rank, world_size, "hello") for rank in range(world_size)]


def test_ranks_are_other_processes_and_stay(rank_pool: RankPool) -> None:
    pids = [[result[3] for result in rank_pool.run(2, _who, "")] for _ in range(2)]
    assert pids[0] == pids[1]
    assert len({os.getpid(), *pids[0]}) == 3


def test_ranks_meet_in_a_process_group_again_and_again(rank_pool: RankPool) -> None:
    for size in (1, 7):
        for result in rank_pool.run(3, _all_reduce, size):
            assert torch.equal(result, torch.arange(size, dtype=torch.float64) * 6)


def test_each_call_has_a_store_of_its_own(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, _pass_on) == ["word 1", "word 0"]


def test_a_failure_names_the_rank_and_shows_its_traceback(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2: Traceback[\s\S]*ValueError: no luck on 1") as failure:
        rank_pool.run(2, _fail_on, 1, "raise")
    assert list(failure.value.causes) == [1]
    with pytest.raises(RankFailure, match="rank 0 of 2: the process ended with code -9"):
        rank_pool.run(2, _fail_on, 0, "die")
    with pytest.raises(RankFailure, match="UserWarning: careful"):
        rank_pool.run(1, _fail_on, 0, "warn")
    assert len(rank_pool.run(2, _who, "alive again")) == 2


def _take_the_signal(rank: int, world_size: int, store_address: str) -> None:
    """As `train` does, which gives back what Python knows of: not faulthandler's."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_hanging_rank_is_ended_and_shown(rank_pool: RankPool) -> None:
    rank_pool.run(2, _take_the_signal)
    before = [result[3] for result in rank_pool.run(2, _who, "")]
    with pytest.raises(RankFailure, match=r"rank 1 of 2: did not return within 0.3 s[\s\S]*in _fail_on"):
        rank_pool.run(2, _fail_on, 1, "hang", timeout=0.3)
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_fresh_ranks_have_their_own_environment() -> None:
    assert run_ranks(2, _environment, "DDP_TEST_WORD", environment={"DDP_TEST_WORD": "here"}) == [("here", "1")] * 2
