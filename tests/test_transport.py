"""One contract for every transport, against float64 sums, on real ranks with inputs that differ by rank."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp.errors import PeerLostError, TransportError, UsageError
from ddp.transport.base import ROW_LENGTH, Transport
from ddp.transport.ring import CHUNK_BYTES, DEPTH
from ddp.transport.segment import open_of
from ddp.transport.select import select_transport
from ranks import RankFailure, RankPool, process_group, run_ranks

CASES = [
    ("shared_memory", torch.float32),
    ("shared_memory", torch.float64),
    ("shared_memory", torch.float16),
    ("shared_memory", torch.bfloat16),
    ("c10d", torch.float32),
    ("c10d", torch.float64),
    ("c10d", torch.float16),
    ("c10d", torch.bfloat16),
]
CHUNK = CHUNK_BYTES // 4
SIZES = (0, 1, 1009, CHUNK - 1, CHUNK + 1, (DEPTH + 2) * CHUNK + 17)


def _gradients(world_size: int, size: int, dtype: torch.dtype, round_: int = 0) -> list[Tensor]:
    """One gradient a rank, each of its own scale and signs; the same list on every rank."""
    generator = torch.Generator().manual_seed(1000 * size + 10 * round_ + world_size)
    return [
        (torch.randn(size, generator=generator, dtype=torch.float64) * (r + 1) + r).to(dtype) for r in range(world_size)
    ]


def _weights(world_size: int) -> list[float]:
    """Unequal, as an uneven last batch gives them."""
    total = sum(range(1, world_size + 1))
    return [(rank + 1) / total for rank in range(world_size)]


def _open(name: str, timeout_seconds: float = 20.0) -> Transport:
    return select_transport(name, "cpu", timeout_seconds)


def _reduce_all_sizes(rank: int, world_size: int, store: str, name: str, dtype: torch.dtype) -> list[Any]:
    results: list[Any] = []
    with process_group(rank, world_size, store):
        transport = _open(name)
        assert transport.name == name
        for size in SIZES:
            for round_ in range(2):
                bucket = _gradients(world_size, size, dtype, round_)[rank]
                reduction = transport.all_reduce_mean_(bucket, _weights(world_size)[rank])
                transport.complete()
                averaged = reduction.bucket
                results.append((averaged, float(reduction.own_squared_norm), float(reduction.mean_squared_norm)))
        dist.barrier()
        transport.close()
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_mean_and_norms(rank_pool: RankPool, name: str, dtype: torch.dtype, world_size: int) -> None:
    by_rank = rank_pool.run(world_size, _reduce_all_sizes, name, dtype)
    epsilon = torch.finfo(dtype).eps
    position = 0
    for size in SIZES:
        for round_ in range(2):
            gradients = [gradient.double() for gradient in _gradients(world_size, size, dtype, round_)]
            weights = _weights(world_size)
            expected = sum((w * g for w, g in zip(weights, gradients, strict=True)), torch.zeros(size).double())
            # Rounding is relative to the terms, which may cancel in their sum.
            terms = sum((w * g.abs() for w, g in zip(weights, gradients, strict=True)), torch.zeros(size).double())
            first = by_rank[0][position][0]
            assert first.shape == (size,)
            assert bool(((first.double() - expected).abs() <= 2 * world_size * epsilon * terms).all()), (size, round_)
            for rank in range(world_size):
                averaged, own, mean = by_rank[rank][position]
                assert torch.equal(averaged, first), f"rank {rank} holds other bits than rank 0 at size {size}"
                assert own == pytest.approx(float(gradients[rank].square().sum()), rel=2e-6, abs=1e-300)
                assert mean == pytest.approx(float(averaged.double().square().sum()), rel=2e-6, abs=1e-300)
            position += 1


def _reduce_in_parts(rank: int, world_size: int, store: str, cuts: list[int], dtype: torch.dtype) -> Tensor:
    with process_group(rank, world_size, store):
        transport = _open("shared_memory")
        gradient = _gradients(world_size, cuts[-1], dtype)[rank]
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
            transport.all_reduce_mean_(gradient[start:stop], _weights(world_size)[rank])
        dist.barrier()
        transport.close()
        return gradient


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_buckets(rank_pool: RankPool, world_size: int, dtype: torch.dtype) -> None:
    size = 3 * CHUNK + 101
    whole = rank_pool.run(world_size, _reduce_in_parts, [size], dtype)[0]
    parts = rank_pool.run(world_size, _reduce_in_parts, [1, 7, 1000, CHUNK + 3, 2 * CHUNK, size], dtype)[0]
    assert torch.equal(whole, parts)


def _exchange_rows(rank: int, world_size: int, store: str, name: str, rounds: int) -> list[np.ndarray]:
    with process_group(rank, world_size, store):
        transport = _open(name)
        rows = []
        for round_ in range(rounds):
            if round_ % 7 == rank:
                time.sleep(0.004)  # everyone is the late one at times, late enough for the others to sleep
            rows.append(transport.exchange_row(np.arange(float(ROW_LENGTH)) + 100 * rank + 10_000 * round_))
            if round_ % 3 == 0:  # buckets and rows take turns, as in training
                transport.all_reduce_mean_(torch.ones(5), 1.0 / world_size)
                transport.complete()
        dist.barrier()
        transport.close()
        return rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["shared_memory", "c10d"])
def test_rows_reach_everyone(rank_pool: RankPool, name: str, world_size: int) -> None:
    rounds = 40
    for rows in rank_pool.run(world_size, _exchange_rows, name, rounds):
        for round_ in range(rounds):
            expected = np.arange(ROW_LENGTH) + 100.0 * np.arange(world_size)[:, None] + 1e4 * round_
            assert np.array_equal(rows[round_], expected)


def _reduce_values(rank: int, world_size: int, store: str, values: list[list[float]], dtype: torch.dtype) -> Any:
    with process_group(rank, world_size, store):
        transport = _open("shared_memory")
        bucket = torch.tensor(values[rank], dtype=dtype)
        reduction = transport.all_reduce_mean_(bucket, 1.0 / world_size)
        dist.barrier()
        transport.close()
        return bucket, reduction.own_squared_norm, reduction.mean_squared_norm


def test_norms_outside_the_range_of_float32_squares(rank_pool: RankPool) -> None:
    values = [[1e25, -3e25, 2.0], [3e-25, 4e-25, 0.0]]
    (_, large, mean), (_, small, _) = rank_pool.run(2, _reduce_values, values, torch.float32)
    assert large == pytest.approx(1e51, rel=1e-6)  # 1e50 overflows float32, whose largest number is 3e38
    assert small == pytest.approx(25e-50, rel=1e-6)  # and 9e-50 underflows it
    assert mean == pytest.approx(0.25e51, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_norms(rank_pool: RankPool, bad: float) -> None:
    results = rank_pool.run(2, _reduce_values, [[1.0, 2.0], [bad, 2.0]], torch.float32)
    assert math.isfinite(results[0][1])
    assert not math.isfinite(results[1][1])
    for averaged, _, mean in results:
        assert not math.isfinite(mean)
        assert not math.isfinite(averaged[0]) and averaged[1] == 2.0


def _bring_different_lengths(rank: int, world_size: int, store: str) -> str:
    with process_group(rank, world_size, store):
        transport = _open("shared_memory", timeout_seconds=3.0)
        try:
            transport.all_reduce_mean_(torch.ones(10 + rank), 0.5)
        except TransportError as error:
            transport.close(failed=True)
            return str(error)
        transport.close()
        return ""


def test_different_lengths_are_refused(rank_pool: RankPool) -> None:
    messages = rank_pool.run(2, _bring_different_lengths)
    assert any("another number" in message for message in messages)
    assert all(messages)


def _stay_away(rank: int, world_size: int, store: str, absent: int) -> str:
    with process_group(rank, world_size, store):
        transport = _open("shared_memory", timeout_seconds=0.6)
        message = ""
        if rank != absent:
            try:
                transport.all_reduce_mean_(torch.ones(100), 1 / world_size)
            except PeerLostError as error:
                message = str(error)
        dist.barrier()
        transport.close()
        return message


@pytest.mark.parametrize(("world_size", "absent"), [(2, 0), (3, 2), (4, 1)])
def test_deadline_names_the_missing_rank(rank_pool: RankPool, world_size: int, absent: int) -> None:
    for rank, message in enumerate(rank_pool.run(world_size, _stay_away, absent)):
        if rank != absent:
            assert message.startswith(f"rank {absent} (pid "), message
            assert "within 0.6 s" in message


def _leave_early(rank: int, world_size: int, store: str, failed: bool) -> str:
    with process_group(rank, world_size, store):
        transport = _open("shared_memory", timeout_seconds=30.0)
        transport.all_reduce_mean_(torch.ones(3), 0.5)
        if rank == 1:
            transport.close(failed=failed)
            dist.barrier()
            return ""
        try:
            transport.exchange_row(np.zeros(ROW_LENGTH))
        except PeerLostError as error:
            dist.barrier()
            transport.close()
            return str(error)
        return "no error"


@pytest.mark.parametrize(("failed", "word"), [(True, "failed"), (False, "left")])
def test_a_rank_that_leaves_is_named_at_once(rank_pool: RankPool, failed: bool, word: str) -> None:
    message = rank_pool.run(2, _leave_early, failed, timeout=15)[0]
    assert message.startswith("rank 1 (pid ") and word in message


def _die(rank: int, world_size: int, store: str) -> None:
    with process_group(rank, world_size, store):
        transport = _open("shared_memory", timeout_seconds=30.0)
        transport.all_reduce_mean_(torch.ones(3), 1 / world_size)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        transport.all_reduce_mean_(torch.ones(1_000_000), 1 / world_size)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(3, _die, timeout=20)
    for survivor in (0, 2):
        assert "PeerLostError: rank 1 (pid " in caught.value.causes[survivor]
        assert "died" in caught.value.causes[survivor]


def _refuse(rank: int, world_size: int, store: str, name: str, device_type: str) -> str:
    with process_group(rank, world_size, store):
        try:
            select_transport(name, device_type, 1.0)
        except UsageError as error:
            return str(error)
        return ""


@pytest.mark.parametrize(
    ("name", "device_type", "words"),
    [("shm", "cpu", "valid: auto, shared_memory, hierarchical, mpi, c10d"), ("shared_memory", "cuda", "cuda")],
)
def test_impossible_transports_are_refused(rank_pool: RankPool, name: str, device_type: str, words: str) -> None:
    assert all(words in message for message in rank_pool.run(2, _refuse, name, device_type))


def _automatic(rank: int, world_size: int, store: str) -> str:
    with process_group(rank, world_size, store):
        transport = _open("auto")
        dist.barrier()
        transport.close()
        return transport.name


@pytest.mark.parametrize("world_size", [1, 2])
def test_auto_takes_shared_memory_on_one_node(rank_pool: RankPool, world_size: int) -> None:
    assert rank_pool.run(world_size, _automatic) == ["shared_memory"] * world_size


def _mappings(rank: int, world_size: int, store: str) -> tuple[int, int, int]:
    def count() -> int:
        with open("/proc/self/maps", encoding="ascii") as maps:
            return sum("ddp-gradients" in line for line in maps)

    with process_group(rank, world_size, store):
        before, descriptors = count(), len(os.listdir("/proc/self/fd"))
        transport = _open("shared_memory")
        during = count()
        dist.barrier()
        transport.close()
        del transport
        return during - before, count() - before, len(os.listdir("/proc/self/fd")) - descriptors


def test_the_memory_is_given_back(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, _mappings) == [(1, 0, 0)] * 2


def _without_memfd(rank: int, world_size: int, store: str, name: str, megabytes: int = 0) -> tuple[str, str]:
    """The transport's name or the usage error, and what was logged."""
    logged, create = io.StringIO(), os.memfd_create
    handler = logging.StreamHandler(logged)
    logging.getLogger("ddp").addHandler(handler)
    os.memfd_create = _refuse_memfd
    if megabytes:
        _mount_small_shared_memory(megabytes)
    files = set(os.listdir("/dev/shm"))
    try:
        with process_group(rank, world_size, store):
            transport = _open(name)
            bucket = torch.full((5,), float(rank))
            transport.all_reduce_mean_(bucket, 1 / world_size)
            transport.complete()
            assert bucket.tolist() == [(world_size - 1) / 2] * 5
            assert not [file for file in set(os.listdir("/dev/shm")) - files if file.startswith("ddp")]
            transport.close()
            return transport.name, logged.getvalue()
    except UsageError as error:
        return str(error), logged.getvalue()
    finally:
        os.memfd_create = create
        logging.getLogger("ddp").removeHandler(handler)


def _refuse_memfd(name: str, flags: int = 0) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _mount_small_shared_memory(megabytes: int) -> None:
    """A /dev/shm of this process alone, in a mount namespace of its own; it goes with the process."""
    new_mounts = 0x00020000  # CLONE_NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    small = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", "/dev/shm"]
    for command in (["mount", "--make-rprivate", "/"], small):
        subprocess.run(command, check=True, timeout=10)


def _need_root() -> None:
    if os.geteuid() != 0:
        reason = "mounting a small /dev/shm needs root"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def test_a_nameless_file_serves_where_there_is_no_anonymous_memory(rank_pool: RankPool) -> None:
    assert rank_pool.run(3, _without_memfd, "auto") == [("shared_memory", "")] * 3


def test_auto_falls_back_with_one_warning_where_there_is_no_memory_to_share() -> None:
    _need_root()
    answers = run_ranks(3, _without_memfd, "auto", 1, timeout=60)
    assert [name for name, _ in answers] == ["c10d"] * 3
    assert [logged.count("\n") for _, logged in answers] == [1, 0, 0]
    assert "through c10d" in answers[0][1] and "No space left" in answers[0][1]


def test_shared_memory_that_was_asked_for_is_refused_by_all_where_there_is_none() -> None:
    _need_root()
    answers = run_ranks(3, _without_memfd, "shared_memory", 1, timeout=60)
    (message,) = {message for message, _ in answers}
    assert message.startswith('transport "shared_memory": ')
    assert "No space left" in message and "/dev/shm" in message and "--shm-size" in message
    assert [logged for _, logged in answers] == [""] * 3


def _with_memfd(rank: int, world_size: int, store: str) -> str:
    _mount_small_shared_memory(1)
    return _automatic(rank, world_size, store)


def test_anonymous_memory_needs_no_room_in_dev_shm() -> None:
    _need_root()
    assert run_ranks(3, _with_memfd, timeout=60) == ["shared_memory"] * 3


NONCE = 0x1234_5678_9ABC_DEF0


def _pipe(_: Path) -> list[int]:
    return list(os.pipe())


def _directory(folder: Path) -> list[int]:
    return [os.open(folder, os.O_RDONLY)]


def _file(content: bytes) -> Callable[[Path], list[int]]:
    def make(folder: Path) -> list[int]:
        (folder / "file").write_bytes(content)
        return [os.open(folder / "file", os.O_RDWR)]

    return make


@pytest.mark.parametrize(
    "make",
    [_pipe, _directory, _file(b""), _file(np.int64(NONCE).tobytes()[:7]), _file(np.int64(NONCE + 1).tobytes())],
    ids=["pipe", "directory", "empty", "short", "another nonce"],
)
def test_a_strangers_file_is_left_alone(tmp_path: Path, make: Callable[[Path], list[int]]) -> None:
    remote, *others = make(tmp_path)
    try:
        before = os.listdir("/proc/self/fd")
        assert open_of(os.getpid(), remote, NONCE) == -1
        assert os.listdir("/proc/self/fd") == before
    finally:
        for descriptor in (remote, *others):
            os.close(descriptor)
    assert open_of(os.getpid(), remote, NONCE) == -1  # nothing there any more


def test_a_pipe_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a stranger's device or pipe can have effects."""
    opened: list[str] = []
    monkeypatch.setattr(os, "open", lambda path, *_: opened.append(path) or -1)
    descriptors = os.pipe()
    assert open_of(os.getpid(), descriptors[0], NONCE) == -1
    assert opened == []
    for descriptor in descriptors:
        os.close(descriptor)


def test_the_file_with_the_nonce_is_kept(tmp_path: Path) -> None:
    (remote,) = _file(np.int64(NONCE).tobytes() + b"more")(tmp_path)
    descriptor = open_of(os.getpid(), remote, NONCE)
    assert os.path.sameopenfile(remote, descriptor)
    os.close(descriptor)
    os.close(remote)


def test_kernels_are_cached_where_the_source_is_read_only(tmp_path: Path) -> None:
    program = (
        "import os; real = os.access; "
        "os.access = lambda path, mode: 'ddp/transport/__pycache__' not in str(path) and real(path, mode); "
        "import ddp.transport.kernels"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=True)
    assert list((tmp_path / "ddp").rglob("*.nbi"))
