"""Saving off the step's path: what is saved is what was there at `begin`, ranks agree, failures and kills cost one save."""

from __future__ import annotations

import logging
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import names, save, small_disk
from ddp.checkpoint import (
    Saver,
    Settled,
    check_space,
    clear_left_overs,
    load,
    load_shared,
    newest,
    read_manifest,
    saver,
)
from ddp.errors import CheckpointError, UsageError
from ranks import RankPool, connect_store, run_ranks

DEADLINE_SECONDS = 30.0
ROOT = Path(__file__).resolve().parent.parent


def _until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def _alone(mine: int) -> list[int]:
    return [mine]


# --- one rank ---


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    state = {"weight": torch.arange(1_000_003.0), "history": [1, 2]}
    here = Saver(tmp_path, rank=0, world_size=1, keep=9)
    for step in (1, 2):
        state["weight"][0] = step
        here.begin(step, state, {"step": step}, ("loss", 0.5))
        state["weight"].fill_(-1)  # the steps that follow
        state["history"].append(3)
        assert here.pending == step
        state["history"].pop()
        _until(lambda: here.observe([here.part_saved]))
        assert here.pending is None
        state["weight"].copy_(torch.arange(1_000_003.0))
    _until(lambda: here.published == tmp_path / "step-00000002-loss=0.5")
    here.close()
    for step in (1, 2):
        shared, own = load(tmp_path / f"step-0000000{step}-loss=0.5", 0)
        assert own == {"step": step}
        assert shared["history"] == [1, 2]
        assert shared["weight"][:2].tolist() == [step, 1] and shared["weight"][-1] == 1_000_002


def test_staging_memory_is_used_again_and_grows(tmp_path: Path) -> None:
    here = Saver(tmp_path, rank=0, world_size=1, keep=9)
    memories = []
    for step, size in ((1, 100), (2, 50), (3, 3_000_000), (4, 7)):
        here.begin(step, {"weight": torch.full((size,), float(step))}, {})
        path = here.finish(_alone)
        memories.append(here._staging["shared.safetensors"]._memory)
        assert load_shared(path)["weight"].tolist() == [float(step)] * size
    assert memories[0] is memories[1] is not memories[2] is memories[3]
    here.close()


def test_two_saves_at_once_are_a_mistake(tmp_path: Path) -> None:
    here = Saver(tmp_path, rank=0, world_size=1, keep=2)
    with pytest.raises(RuntimeError, match="nothing was begun"):
        here.finish(_alone)
    here.begin(3, {}, {})
    with pytest.raises(RuntimeError, match="step 3 is still being saved"):
        here.begin(4, {}, {})
    assert here.finish(_alone) == here.finish(_alone) == tmp_path / "step-00000003"
    here.begin(4, {}, {})
    here.finish(_alone)
    here.close()
    assert here.stall_seconds > 0


def test_saving_a_step_again_is_not_settled_by_the_first_time(tmp_path: Path) -> None:
    """As after going back: the number in a rank's row is of the save, not of the step."""
    here = Saver(tmp_path, rank=0, world_size=2, keep=2)
    other = Saver(tmp_path, rank=1, world_size=2, keep=2)
    seen = []
    for _ in range(2):
        first = here.part_saved
        here.begin(0, {}, {})
        assert here.observe([first, first]) is None
        other.begin(0, {}, {})
        _until(lambda first=first: here.part_saved > first and other.part_saved > first)
        seen.append(here.observe([here.part_saved, first]))
        seen.append(here.observe([here.part_saved, other.part_saved]))
        other.observe([here.part_saved, other.part_saved])
    assert seen == [None, Settled(0, True, ())] * 2
    here.close()
    other.close()
    assert names(tmp_path) == ["step-00000000"]


def test_a_failure_is_a_warning_and_the_next_save_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = Saver(tmp_path, rank=0, world_size=1, keep=2)
    here.begin(1, {"bad": object()}, {})
    with caplog.at_level(logging.WARNING):
        assert here.observe([here.part_saved]) == Settled(1, False, (0,))
    assert "rank 0 could not save step 1: shared.safetensors: bad: " in caplog.text and "the run goes on" in caplog.text
    blocked = tmp_path / ".step-00000002.2.partial"
    blocked.touch()  # where the directory should be
    here.begin(2, {}, {})
    _until(lambda: here.part_saved == -2)
    here.observe([-2])
    assert "could not save step 2: File exists" in caplog.text
    assert here.last_error is not None and "step 2" in here.last_error
    here.begin(3, {}, {"fine": 1})
    assert here.finish(_alone) == newest(tmp_path) == here.published
    here.close()


def test_settling_waits_and_a_failure_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = Saver(tmp_path, rank=0, world_size=1, keep=9)
    assert here.settle(_alone) is None
    for step, bad in ((1, None), (2, object()), (3, None)):
        here.begin(step, {"weight": torch.zeros(1_000_000)}, {"bad": bad})
        assert here.settle(_alone) == Settled(step, step != 2, (0,) if step == 2 else ())
        assert here.pending is None
    assert "rank 0 could not save step 2" in caplog.text
    assert here.finish(_alone) == newest(tmp_path)
    here.close()
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_publication_that_fails_in_the_background_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    save(tmp_path, 1)
    here = Saver(tmp_path, rank=0, world_size=1, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "publish", refuse)
        here.begin(2, {}, {})
        _until(lambda: here.observe([here.part_saved]))
        _until(lambda: "could not save step 2: Input/output error; the run goes on" in caplog.text)
        here.begin(3, {}, {})
        with pytest.raises(CheckpointError, match="rank 0 could not save step 3: Input/output error"):
            here.finish(_alone)
    assert names(tmp_path) == ["step-00000001"]
    here.begin(4, {}, {})
    assert here.finish(_alone) == newest(tmp_path)
    here.close()


def test_closing_gives_up_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_it, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        at_it.set()
        assert go_on.wait(DEADLINE_SECONDS)
        write_parts(*arguments)

    write_parts = saver.write_parts
    monkeypatch.setattr(saver, "write_parts", slow)
    here = Saver(tmp_path, rank=0, world_size=1, keep=2)
    here.begin(1, {"weight": torch.zeros(1000)}, {})
    assert at_it.wait(DEADLINE_SECONDS)
    here.close(timeout_seconds=0.01)  # not waited for longer than that
    go_on.set()
    here.close()
    assert here.part_saved == -1 and "the run ended before it was written" in str(here.last_error)
    assert names(tmp_path) == []


def test_left_overs_of_kills_go_and_nothing_else_does(tmp_path: Path) -> None:
    for name in (".step-00000003.1.partial", ".step-00000002.removed", "step-00000004", "else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    clear_left_overs(tmp_path)
    clear_left_overs(tmp_path / "nothing")
    assert names(tmp_path) == ["else", "step-00000004"]


# --- several ranks ---


def _save_together(
    rank: int, world_size: int, store_address: str, directory: str, step: int, failing: int | None
) -> tuple[str, int, bool]:
    """Save with a gather of the store's: what was returned or raised, gathers met, whether another rank is the cause."""
    store = connect_store(store_address)
    met = 0

    def gather(mine: int) -> list[int]:
        nonlocal met
        met += 1
        store.set(f"{met} {rank}", str(mine))
        return [int(store.get(f"{met} {each}")) for each in range(world_size)]

    own = {"rank": rank, "buffer": torch.full((rank + 1,), float(rank)), "bad": object() if rank == failing else None}
    here = Saver(Path(directory), rank=rank, world_size=world_size, keep=1)
    here.begin(step, {"step": step} if rank == 0 else {}, own, ("loss", 0.5))
    try:
        return str(here.finish(gather)), met, False
    except CheckpointError as error:
        return str(error), met, error.consequence
    finally:
        here.close()


def test_each_rank_gets_its_own_back(rank_pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "step-00000004-loss=0.5"
    assert rank_pool.run(3, _save_together, str(tmp_path), 4, None) == [(str(path), 2, False)] * 3
    for rank in range(3):
        shared, own = load(path, rank)
        assert shared == {"step": 4}
        assert own["rank"] == rank
        assert own["buffer"].tolist() == [rank] * (rank + 1)
    ranks = [f"rank-0000{rank}.safetensors" for rank in range(3)]
    assert sorted(read_manifest(path).files) == [*ranks, "shared.safetensors"]
    assert load(path, 5)[1]["rank"] == 2  # with more ranks than wrote it
    assert load_shared(path) == {"step": 4}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step", [4, 8])
def test_one_failing_rank_fails_all_and_the_older_stays(
    rank_pool: RankPool, tmp_path: Path, failing: int, step: int
) -> None:
    rank_pool.run(2, _save_together, str(tmp_path), 4, None)
    answers = rank_pool.run(2, _save_together, str(tmp_path), step, failing)
    assert [met for _, met, _ in answers] == [2, 2]
    assert [consequence for _, _, consequence in answers] == [rank != failing for rank in range(2)]
    messages = [message for message, _, _ in answers]
    assert f"rank {failing} could not save step {step}: rank-0000{failing}.safetensors: bad: " in messages[failing]
    assert f"because rank {failing} could not; see its message" in messages[1 - failing]
    assert names(tmp_path) == ["step-00000004-loss=0.5"]


def _save_apart(rank: int, world_size: int, store_address: str, directory: str) -> tuple[str, int, bool]:
    return _save_together(rank, world_size, store_address, f"{directory}/{rank}", 4, None)


def test_nodes_that_do_not_share_the_directory_are_told(rank_pool: RankPool, tmp_path: Path) -> None:
    answers = rank_pool.run(2, _save_apart, str(tmp_path))
    assert "rank-00001.safetensors is not in " in answers[0][0] and "do all nodes share" in answers[0][0]
    assert [(met, consequence) for _, met, consequence in answers] == [(2, False), (2, True)]
    assert "because rank 0 could not" in answers[1][0]


# --- full disks and kills ---


def _save_with_small_files_only(rank: int, world_size: int, store_address: str, directory: str) -> str:
    """The disk refuses to go past 20,000 bytes a file, in the middle of writing."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(CheckpointError) as refused:
        save(Path(directory), 2, shared={"weight": torch.zeros(100_000)})
    save(Path(directory), 3)
    return str(refused.value)


def test_a_refused_write_leaves_nothing_and_keeps_the_older(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (message,) = run_ranks(1, _save_with_small_files_only, str(tmp_path))
    assert "rank 0 could not save step 2: File too large" in message
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        save(disk, 1)
        with pytest.raises(CheckpointError, match=r"shared.safetensors .* needs 1.53 MiB, 1?\d\d\d KiB free on .*disk"):
            save(disk, 2, shared={"weight": torch.zeros(400_000)})
        assert names(disk) == ["step-00000001"]
        with pytest.raises(UsageError, match=r"2 checkpoints need 1.2 MiB, \d+ KiB free on .*disk; make room"):
            check_space(disk / "run" / "checkpoints", 630_000)
        check_space(disk / "run" / "checkpoints", 100_000)


def test_a_disk_that_fills_meanwhile_costs_that_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp.checkpoint.space.require", lambda *_: None)  # as if another process took the room
    with small_disk(tmp_path / "disk", "1m") as disk:
        save(disk, 1)
        here = Saver(disk, rank=0, world_size=1, keep=2)
        here.begin(2, {"weight": torch.zeros(400_000)}, {})
        with pytest.raises(CheckpointError, match="rank 0 could not save step 2: No space left on device"):
            here.finish(_alone)
        _until(lambda: names(disk) == ["step-00000001"])
        here.begin(3, {"weight": torch.zeros(4_000)}, {})
        assert here.finish(_alone) == newest(disk)
        here.close()
        assert names(disk) == ["step-00000001", "step-00000003"]


def test_a_kill_at_any_moment_leaves_a_valid_newest_one() -> None:
    import kill_while_saving  # not where ranks import this module

    cases = kill_while_saving.kill_cases(seed=20, count=24)
    assert cases.faults == ()
    assert cases.kills == 24 and cases.while_saving > 0
    assert cases.row().startswith("| kill at 24 random points inside saving")


def test_the_benchmark_of_what_saving_holds_up_runs(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "checkpoint_stall.py"
    options = ["--parameters", "1001", "--saves", "2", "--alone-seconds", "0.01", "--directory", str(tmp_path)]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()][2:] == ["| 1", "| 2"]
