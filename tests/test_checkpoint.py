"""Checkpoints: what goes in comes out, bad ones are told, and a kill or a full disk costs at most the one being written."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddp.errors import CheckpointError
from ddp.training.checkpoint import load, load_shared, newest, read_manifest, save, verify
from ddp.training.random_state import random_state, restore_random_state
from ranks import RankPool, connect_store, run_ranks


def _save(directory: Path, step: int, keep: int = 2, shared: Any = None, own: Any = None) -> Path:
    shared = {"weight": torch.full((300,), float(step))} if shared is None else shared
    own = {"own": step} if own is None else own
    return save(directory, step, shared, own, rank=0, world_size=1, barrier=lambda: None, keep=keep)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- what goes in comes out ---


def test_shared_and_own_come_back_with_types_and_bits(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).to(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    shared = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [(1, 0.1, "word"), (2, float("inf"), None)],
        "bfloat16": torch.randn(7).to(torch.bfloat16),
    }
    path = _save(tmp_path, 3, shared=shared, own={"empty": torch.empty(0)})
    loaded, own = load(path, 0)
    assert own["empty"].shape == (0,)
    assert loaded["history"] == shared["history"]
    assert loaded["bfloat16"].dtype == torch.bfloat16
    for name in ("model", "bfloat16"):
        torch.testing.assert_close(loaded[name], shared[name], rtol=0, atol=0)
    other = torch.optim.AdamW(model.parameters(), lr=1.0)
    other.load_state_dict(loaded["optimizer"])
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"loss": np.float64(1.5)}, r"shared.pt: loss: .* not a numpy.float64"),
        ({"a": [1, {2, 3}]}, r"shared.pt: a\[1\]: .* not a builtins.set"),
        ({"path": Path("x")}, "not a pathlib"),
    ],
)
def test_a_value_that_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _save(tmp_path, 1, shared=value)
    assert _names(tmp_path) == []


def test_random_generators_continue_after_a_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(2)  # the global generator is what a task may use
    random.seed(3)
    random.gauss()  # leaves half a pair behind, which belongs to the state
    np.random.standard_normal()
    path = _save(tmp_path, 1, own=random_state())

    def draw() -> list[Any]:
        return [
            torch.rand(5).tolist(),
            np.random.standard_normal(5).tolist(),
            np.random.rand(700).tolist(),
            [random.gauss() for _ in range(3)],
            random.random(),
        ]

    expected = draw()
    assert draw() != expected
    restore_random_state(load(path, 0)[1])
    assert draw() == expected


# --- which one is taken, which ones stay ---


def test_the_newest_is_taken_and_older_ones_go(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    assert newest(directory) is None
    for step in (5, 10, 99_999_999, 100_000_000):
        _save(directory, step, keep=3)
    assert newest(directory) == directory / "step-100000000"
    assert _names(directory) == ["step-00000010", "step-100000000", "step-99999999"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for word in ("first", "second"):
        _save(tmp_path, 7, own={"word": word})
    path = newest(tmp_path)
    assert path is not None
    assert load(path, 0)[1] == {"word": "second"}
    assert _names(tmp_path) == ["step-00000007"]


def test_one_that_gave_way_is_found_if_the_new_one_never_got_its_name(tmp_path: Path) -> None:
    _save(tmp_path, 7).rename(tmp_path / "step-00000007.replaced")
    assert newest(tmp_path) == tmp_path / "step-00000007.replaced"
    _save(tmp_path, 7)
    assert _names(tmp_path) == ["step-00000007"]


def test_newer_ones_go_after_going_back(tmp_path: Path) -> None:
    for step in (30, 40, 50):
        _save(tmp_path, step, keep=9)
    _save(tmp_path, 35, keep=9)
    assert _names(tmp_path) == ["step-00000030", "step-00000035"]


def test_everything_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = _save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    assert [oct(entry.stat().st_mode & 0o777) for entry in (path.parent, path, *sorted(path.iterdir()))] == [
        "0o700",
        "0o700",
        "0o600",
        "0o600",
        "0o600",
    ]


# --- bad ones ---


def _truncate(path: Path) -> None:
    file = path / "shared.pt"
    os.truncate(file, file.stat().st_size - 1)


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / "rank-00000.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "rank-00000.pt").write_bytes(content)


def _link(path: Path) -> None:
    file = path / "shared.pt"
    file.rename(path.parent.parent / "elsewhere.pt")
    file.symlink_to(path.parent.parent / "elsewhere.pt")


def _manifest_of_another_version(path: Path) -> None:
    table = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(table | {"version": 99}))


def _manifest_of_the_version_before(path: Path) -> None:
    """Its state had the same files, and other things in them."""
    table = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(table | {"version": 1}))


def _manifest_that_points_out(path: Path) -> None:
    table = json.loads((path / "manifest.json").read_text())
    table["files"]["../step-00000001/shared.pt"] = table["files"].pop("shared.pt")
    (path / "manifest.json").write_text(json.dumps(table))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (_truncate, r"shared.pt: \d+ bytes where \d+ were written"),
    (_flip_a_bit, r"rank-00000.pt: its content has changed"),
    (lambda path: (path / "shared.pt").unlink(), "shared.pt: cannot be opened: No such file"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json: cannot be opened: No such file"),
    (lambda path: (path / "manifest.json").write_text("{}"), "not a checkpoint's manifest"),
    (lambda path: (path / "manifest.json").write_text("{"), "not a checkpoint's manifest"),
    (_manifest_of_another_version, "version 99"),
    (_manifest_of_the_version_before, "version 1, .* reads version 2; start a new run"),
    (_manifest_that_points_out, "outside the checkpoint"),
    (_link, "shared.pt: cannot be opened: Too many levels of symbolic links"),
    (lambda path: (path / "shared.pt").chmod(0o666), "shared.pt: every user may write to it"),
    (lambda path: path.chmod(0o777), "step-00000002: every user may write to it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_bad_one_is_told_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "checkpoints"
    good, bad = _save(directory, 1), _save(directory, 2)
    verify(bad)
    damage(bad)
    with pytest.raises(CheckpointError, match=message):
        load(bad, 0)
    with caplog.at_level(logging.WARNING):
        assert newest(directory) == good
    assert "passing over" in caplog.text
    assert str(bad) in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    os.chown(path / "shared.pt", 12345, -1)
    with pytest.raises(CheckpointError, match=r"shared.pt: belongs to user 12345, not to you"):
        load(path, 0)


def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "step-00000001", 0)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _save(tmp_path / "checkpoints", 1)
    with (path / "shared.pt").open("wb") as file:
        torch.save({"model": _Bomb()}, file)
    _rewrite_manifest(path, "shared.pt")
    assert newest(tmp_path / "checkpoints") == path  # nothing but its content is wrong with it
    with pytest.raises(CheckpointError, match=r"shared\.pt: holds more than tensors and plain values"):
        load_shared(path)
    (path / "shared.pt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    _rewrite_manifest(path, "shared.pt")
    with pytest.raises(CheckpointError, match=r"shared\.pt: holds more than tensors and plain values"):
        load(path, 0)
    assert not (tmp_path / "exploded").exists()


def _rewrite_manifest(path: Path, name: str) -> None:
    """What someone with access to the directory would do."""
    digest = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout.split()[0]
    table = json.loads((path / "manifest.json").read_text())
    table["files"][name] = {"size_bytes": (path / name).stat().st_size, "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(table))


# --- several ranks ---


def _save_together(
    rank: int, world_size: int, store_address: str, directory: str, step: int, failing: int | None
) -> tuple[str, int, bool]:
    """Save with a barrier of the store's: what was returned or raised, barriers met, whether another rank is the cause."""
    store = connect_store(store_address)
    met = 0

    def barrier() -> None:
        nonlocal met
        met += 1
        store.add(f"barrier {met}", 1)
        while store.add(f"barrier {met}", 0) < world_size:
            time.sleep(0.001)

    own = {"rank": rank, "buffer": torch.full((rank + 1,), float(rank)), "bad": object() if rank == failing else None}
    shared = {"step": step} if rank == 0 else {}
    try:
        path = save(Path(directory), step, shared, own, rank=rank, world_size=world_size, barrier=barrier, keep=1)
        return str(path), met, False
    except CheckpointError as error:
        return str(error), met, error.consequence


def test_each_rank_gets_its_own_back(rank_pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "step-00000004"
    assert rank_pool.run(3, _save_together, str(tmp_path), 4, None) == [(str(path), 3, False)] * 3
    for rank in range(3):
        shared, own = load(path, rank)
        assert shared == {"step": 4}
        assert own["rank"] == rank
        assert own["buffer"].tolist() == [rank] * (rank + 1)
    assert sorted(read_manifest(path).files) == ["rank-00000.pt", "rank-00001.pt", "rank-00002.pt", "shared.pt"]
    assert load(path, 5)[1]["rank"] == 2  # with more ranks than wrote it
    assert load_shared(path) == {"step": 4}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step", [4, 8])
def test_one_failing_rank_fails_all_and_the_older_stays(
    rank_pool: RankPool, tmp_path: Path, failing: int, step: int
) -> None:
    rank_pool.run(2, _save_together, str(tmp_path), 4, None)
    answers = rank_pool.run(2, _save_together, str(tmp_path), step, failing)
    assert [met for _, met, _ in answers] == [3, 3]
    assert [consequence for _, _, consequence in answers] == [rank != failing for rank in range(2)]
    messages = [message for message, _, _ in answers]
    assert f"rank {failing} could not save step {step}: rank-0000{failing}.pt: bad: " in messages[failing]
    assert "see its message" in messages[1 - failing] or "see that rank's message" in messages[1 - failing]
    assert _names(tmp_path) == ["step-00000004"]
    assert newest(tmp_path) == tmp_path / "step-00000004"


def test_a_directory_that_rank_0_cannot_make_is_its_own_failure_alone(rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.partial").touch()  # not a directory, so that it cannot be cleared away as one
    answers = rank_pool.run(2, _save_together, str(tmp_path), 8, None)
    assert [(met, consequence) for _, met, consequence in answers] == [(3, False), (3, True)]
    assert "rank 0 could not save step 8: Not a directory" in answers[0][0]
    assert newest(tmp_path) is None


# --- full disks and kills ---


def _save_with_small_files_only(rank: int, world_size: int, store_address: str, directory: str) -> str:
    """The disk refuses to go past 20,000 bytes a file, in the middle of torch.save."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(CheckpointError) as refused:
        _save(Path(directory), 2, shared={"weight": torch.zeros(100_000)})
    return str(refused.value)


def test_a_refused_write_leaves_nothing_and_keeps_the_older(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (message,) = run_ranks(1, _save_with_small_files_only, str(tmp_path))
    assert "rank 0 could not save step 2: File too large" in message
    assert _names(tmp_path) == ["step-00000001"]


@contextlib.contextmanager
def _small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        reason = f"a disk of {size} needs root and mount: {mounted.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_leaves_nothing_and_keeps_the_older(tmp_path: Path) -> None:
    with _small_disk(tmp_path / "disk", "1m") as disk:
        _save(disk, 1)
        with pytest.raises(CheckpointError, match="rank 0 could not save step 2: No space left on device"):
            _save(disk, 2, shared={"weight": torch.zeros(400_000)})
        assert _names(disk) == ["step-00000001"]
        path = newest(disk)
        assert path is not None
        assert load(path, 0)[0]["weight"].tolist() == [1.0] * 300


def _killed_writers(rank: int, world_size: int, store_address: str, directory: str, kills: int) -> list[str]:
    """Fork writers that save as fast as they can, kill each at a random moment, look at what is there."""
    draw = random.Random(20)
    faults: list[str] = []
    for attempt in range(kills):
        place = Path(directory) / str(attempt)
        reader, writer = os.pipe()
        if not (child := os.fork()):
            for step in range(1, 1000):
                _save(place, step, keep=1 + attempt % 2)
                os.write(writer, bytes([step % 256]))
            os._exit(0)
        os.close(writer)
        os.read(reader, 1)  # the first is saved
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        finished = 1 + len(os.read(reader, 10_000))
        os.close(reader)
        faults += [f"kill {attempt} after step {finished}: {fault}" for fault in _faults(place, finished)]
    return faults


def _faults(place: Path, finished: int) -> Iterator[str]:
    path = newest(place)
    if path is None:
        yield f"nothing valid in {_names(place)}"
        return
    shared, own = load(path, 0)
    if own["own"] not in (finished, finished + 1) or shared["weight"].tolist() != [float(own["own"])] * 300:
        yield f"found {path.name} holding {own}"
    for entry in place.glob("step-*"):
        try:
            verify(entry)
        except CheckpointError as error:
            yield f"a bad one has a name: {error}"
    _save(place, 5000)
    if list(place.glob(".*")):
        yield f"the next save left {_names(place)}"


def test_a_kill_at_any_moment_leaves_a_valid_newest_one(tmp_path: Path) -> None:
    assert run_ranks(1, _killed_writers, str(tmp_path), 40, timeout=60) == [[]]
