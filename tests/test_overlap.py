"""The communication thread: what it brings, that nothing waits for it, and how it ends."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ddp import outcome
from ddp.errors import CheckpointError, PeerLostError, TransportError
from ddp.transport.base import ROW_LENGTH, BucketState, Reduction, Transport
from ddp.transport.comm_hook import GradientExchange, comm_hook, register
from ddp.transport.overlap import OverlappedTransport
from ddp.transport.select import select_transport
from jobs import Ended, finish, started
from ranks import RankPool, connect_store, process_group, run_ranks
from training_runs import Ended as TrainingEnded
from training_runs import Misbehaving, differences, job, losses_of, train_ranks

TRANSPORTS = ("shared_memory", "c10d")
SIZES = (1, 70_001, 0, 1009, 300_007, 5)


def _open(name: str, *, overlap: bool = True, timeout_seconds: float = 20.0) -> Transport:
    return select_transport(name, "cpu", timeout_seconds, overlap=overlap)


def _lane_threads() -> int:
    return sum(thread.name.startswith("ddp-") for thread in threading.enumerate())


def _gradient(rank: int, round_: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * round_ + 10 * rank + size % 7)) + rank


def _rounds(rank: int, world_size: int, store: str, name: str, overlap: bool) -> list[Any]:
    """Buckets, rows between and behind them, and sums, as a script would ask for them."""
    seen: list[Any] = []
    with process_group(rank, world_size, store):
        transport = _open(name, overlap=overlap)
        for round_ in range(4):
            states = [BucketState.of([size // 3, size - size // 3]) for size in SIZES]
            reductions = [
                transport.all_reduce_mean_(_gradient(rank, round_, size), (rank + 1) / 6, state)
                for size, state in zip(SIZES, states, strict=True)
            ]
            transport.complete()
            later = transport.start_row(np.full(ROW_LENGTH, 100.0 * round_ + rank))
            at_once = transport.exchange_row(np.full(ROW_LENGTH, 0.5 + rank))
            assert all(each.future is None or each.future.done() for each in reductions)  # they came before the row
            seen.append([later.result(), at_once])
            seen.append([(each.bucket, each.own_squared_norm, each.mean_squared_norm) for each in reductions])
            seen.append([(state.own_squared_norms, state.mean_squared_norms) for state in states])
        dist.barrier()
        transport.close()
        assert _lane_threads() == 0
    return seen


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_thread_brings_the_same_bits(rank_pool: RankPool, name: str) -> None:
    inline = rank_pool.run(3, _rounds, name, False)
    threaded = rank_pool.run(3, _rounds, name, True)
    for rank in range(3):
        assert [repr(each) for each in threaded[rank]] == [repr(each) for each in inline[rank]]
    for round_ in range(4):
        later, at_once = threaded[0][3 * round_]
        assert later[:, 0].tolist() == [100.0 * round_ + rank for rank in range(3)]
        assert at_once[:, -1].tolist() == [0.5, 1.5, 2.5]
        for size, (averaged, _, mean) in zip(SIZES, threaded[0][3 * round_ + 1], strict=True):
            expected = sum((rank + 1) / 6 * _gradient(rank, round_, size).double() for rank in range(3))
            assert torch.allclose(averaged.double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
            assert mean == pytest.approx(float(averaged.double().square().sum()), rel=2e-6)


def _late_peer(rank: int, world_size: int, store: str, name: str) -> tuple[bool, float, float, float]:
    """Rank 1 begins only when rank 0 has come back from all its calls."""
    with process_group(rank, world_size, store):
        transport, signals = _open(name), connect_store(store)
        if rank == 1:
            signals.wait(["rank 0 is back"])
        bucket = torch.full((1000,), 1.0 + rank)
        reduction = transport.all_reduce_mean_(bucket, 0.5)
        transport.complete()
        answer = transport.start_row(np.full(ROW_LENGTH, float(rank)))
        assert reduction.future is not None
        open_still = not reduction.future.done() and not answer.done()
        if rank == 0:
            signals.set("rank 0 is back", "yes")
        assert reduction.future.wait() is bucket
        assert answer.result()[:, 0].tolist() == [0.0, 1.0]
        transport.exchange_row(np.zeros(ROW_LENGTH))
        waited, exposed = transport.wait_seconds, transport.exposed_seconds
        dist.barrier()
        transport.close()
    return open_still, float(bucket.mean()), waited, exposed


@pytest.mark.parametrize("name", TRANSPORTS)
def test_nothing_waits_for_the_other_rank(rank_pool: RankPool, name: str) -> None:
    (open_still, mean, waited, exposed), (_, other_mean, _, _) = rank_pool.run(2, _late_peer, name)
    assert open_still
    assert mean == other_mean == 1.5
    assert exposed > 0 and waited >= 0


class Slow(Transport):
    """Alone in its world; each call takes a time of its own, of which some is waiting for others."""

    name = "slow"
    dtypes = frozenset({torch.float32})
    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.waited = 0.0
        self.thread_names: set[str] = set()
        self.go = threading.Event()

    @property
    def wait_seconds(self) -> float:
        return self.waited

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        self.thread_names.add(threading.current_thread().name)
        assert self.go.wait(20)
        self.waited += 100.0  # much longer than it was in the way
        return Reduction(bucket, 1.0, 2.0)

    def exchange_row(self, row: np.ndarray) -> np.ndarray:
        self.waited += 7.0
        return row[None]

    def close(self, *, failed: bool = False) -> None:
        self.go.set()


def test_only_what_was_in_the_way_counts_as_waiting() -> None:
    inner = Slow()
    transport = OverlappedTransport(inner)
    reductions = [transport.all_reduce_mean_(torch.ones(3), 1.0) for _ in range(3)]
    transport.complete()
    assert transport.wait_seconds == transport.exposed_seconds == 0
    inner.go.set()
    transport.start_row(np.zeros(ROW_LENGTH)).result()
    assert 0 < transport.exposed_seconds < 20
    assert transport.wait_seconds == transport.exposed_seconds  # 300 s were waited while something else went on
    transport.exchange_row(np.zeros(ROW_LENGTH))
    assert transport.wait_seconds == pytest.approx(transport.exposed_seconds + 7.0)
    assert [(each.own_squared_norm, each.mean_squared_norm) for each in reductions] == [(1.0, 2.0)] * 3
    assert inner.thread_names == {"ddp-slow"}
    transport.close()


def test_an_abandoned_transport_ends_its_thread() -> None:
    before = _lane_threads()
    transport = OverlappedTransport(Slow())
    assert _lane_threads() == before + 1
    del transport
    assert _lane_threads() == before


def _lose_peer(rank: int, world_size: int, store: str, name: str, failed: bool) -> tuple[list[str], bool, int]:
    """Rank 1 takes part in the first bucket of three and closes."""
    with process_group(rank, world_size, store, timeout=3.0):
        transport = _open(name, timeout_seconds=20.0 if name == "shared_memory" else 1.5)
        first = transport.all_reduce_mean_(torch.ones(1000), 0.5)
        transport.complete()
        transport.exchange_row(np.zeros(ROW_LENGTH))
        if rank == 1:
            transport.close(failed=failed)
            connect_store(store).wait(["rank 0 has seen it"])
            return [], True, _lane_threads()
        lost = [transport.all_reduce_mean_(torch.full((1000,), 7.0), 0.5) for _ in range(2)]
        transport.complete()
        completed = all(each.future is not None and each.future.wait() is each.bucket for each in lost)
        messages = [str(first.error), *(str(each.error) for each in lost)]
        with pytest.raises(PeerLostError) as caught:
            transport.exchange_row(np.zeros(ROW_LENGTH))
        answer = transport.start_row(np.zeros(ROW_LENGTH))
        with pytest.raises(PeerLostError):
            answer.result()
        connect_store(store).set("rank 0 has seen it", "yes")
        transport.close()
        transport.close()
        with pytest.raises(TransportError, match="closed"):
            transport.exchange_row(np.zeros(ROW_LENGTH))
        return [*messages, str(caught.value)], completed, _lane_threads()


@pytest.mark.parametrize(
    ("name", "failed", "word"),
    [("shared_memory", True, "failed"), ("shared_memory", False, "left"), ("c10d", True, "c10d")],
)
def test_a_lost_rank_fails_what_is_behind_and_completes_it(
    rank_pool: RankPool, name: str, failed: bool, word: str
) -> None:
    (messages, completed, threads), (_, _, other_threads) = rank_pool.run(2, _lose_peer, name, failed, timeout=40)
    assert completed and threads == other_threads == 0
    assert messages[0] == "None"
    assert word in messages[1]
    assert messages[1:] == [messages[1]] * 3


def _give_up(rank: int, world_size: int, store: str) -> tuple[str, int]:
    """Rank 0 has an error of its own while its thread waits for rank 1, and rank 1 then waits for rank 0."""
    with process_group(rank, world_size, store):
        transport, signals = _open("shared_memory", timeout_seconds=120.0), connect_store(store)
        if rank == 0:
            reduction = transport.all_reduce_mean_(torch.ones(1000), 0.5)
            transport.close(failed=True)
            assert reduction.future is not None and reduction.future.done()
            signals.set("rank 0 is closed", "yes")
            return str(reduction.error), _lane_threads()
        signals.wait(["rank 0 is closed"])
        with pytest.raises(PeerLostError) as caught:
            transport.exchange_row(np.zeros(ROW_LENGTH))
        transport.close()
        return str(caught.value), _lane_threads()


def test_close_cuts_a_waiting_thread_short_and_tells_the_others(rank_pool: RankPool) -> None:
    (own, threads), (other, other_threads) = rank_pool.run(2, _give_up, timeout=30)
    assert "closed" in own
    assert other.startswith("rank 0 (pid ") and "failed" in other
    assert threads == other_threads == 0


def _forked(rank: int, world_size: int, store: str, name: str) -> tuple[int, list[float], float]:
    """A fork while the thread is at work, and a data loader with worker processes in between the steps."""
    with process_group(rank, world_size, store):
        transport = _open(name)
        reduction = transport.all_reduce_mean_(torch.full((400_000,), float(rank)), 0.5)
        if (child := os.fork()) == 0:
            code = 1
            try:
                transport.exchange_row(np.zeros(ROW_LENGTH))
            except TransportError as error:
                transport.close()
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        transport.complete()
        assert reduction.future is not None
        mean = float(reduction.future.wait().mean())
        losses = _train_from_workers(rank, transport)
        dist.barrier()
        transport.close()
        return os.waitstatus_to_exitcode(status), losses, mean


def _train_from_workers(rank: int, transport: Transport) -> list[float]:
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Linear(3, 1))
    exchange = GradientExchange(transport)
    register(model, exchange, comm_hook)
    loader = DataLoader(TensorDataset(torch.randn(12, 3) + rank), batch_size=4, num_workers=1)
    sums = []
    for (inputs,) in loader:
        model(inputs).square().mean().backward()
        sums.append(exchange.take().mean_squared_norm)
        model.zero_grad()
    return sums


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_forked_process_is_left_out_and_hangs_nothing(name: str) -> None:
    # Processes of its own: what other tests have left in one, a fork would inherit and might try to take down.
    (code, sums, mean), (other_code, other_sums, other_mean) = run_ranks(2, _forked, name)
    assert code == other_code == 0
    assert mean == other_mean == 0.5
    assert sums == other_sums and len(sums) == 3 and all(each > 0 for each in sums)


SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import ddp

transport, fault = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(40, 40) for _ in range(8)]), bucket_cap_mb=0.01)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
meter = ddp.attach(model, batch_size=4, transport=transport, timeout_seconds=10.0, overlap=True)

def fail(gradient):
    if fault == "fail" and rank == 1 and step == 3:
        raise ValueError("the user's own error")

model.module[4].weight.register_hook(fail)
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(4, 40)).square().mean().backward()
    optimizer.step()
print("observations", meter.reading.observations, flush=True)
dist.barrier()
"""


def _run_script(folder: Path, *arguments: str) -> list[Ended]:
    """Two ranks of the script, without a launcher, which would swallow their exit codes."""
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "script.py", *arguments]
    with (
        started(command, folder, {**common, "RANK": "0"}) as first,
        started(command, folder, {**common, "RANK": "1"}) as second,
    ):
        return [finish(first), finish(second)]


def test_a_script_that_never_closes_ends_as_it_should(tmp_path: Path) -> None:
    for ended in _run_script(tmp_path, "shared_memory", "none"):
        assert ended.code == 0, ended.stderr
        assert "observations 4" in ended.stdout


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_error_in_the_middle_of_backward_ends_both_ranks(tmp_path: Path, transport: str) -> None:
    first, second = _run_script(tmp_path, transport, "fail")
    assert second.code == 1 and "ValueError: the user's own error" in second.stderr, second.stderr
    assert first.code == 1 and "PeerLostError" in first.stderr and "of backward 4" in first.stderr, first.stderr


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_training_is_the_same_with_a_thread(rank_pool: RankPool, tmp_path: Path, transport: str) -> None:
    losses, parameters = [], []
    for overlap in (False, True):
        folder = tmp_path / str(overlap)
        folder.mkdir()
        here = job(
            folder, optimizer__momentum=0.9, transport__name=transport, transport__overlap=overlap, micro_batch_size=2
        )
        ended = train_ranks(rank_pool, 3, here)
        assert [(each.kind, each.threads) for each in ended] == [("", 0)] * 3
        losses.append(losses_of(folder / "run"))
        parameters.append([each.parameters for each in ended])
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert differences(parameters[0], parameters[1]) == []


class Leaving(Misbehaving):
    """The rank `rank` gives up in the forward of its step `example`."""

    forwards = 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        self.forwards += 1
        if self.is_the_one and self.forwards == 1 + self.example:  # the first settles the buckets
            raise CheckpointError("this rank gives up")
        return super().loss(model, batch)


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "thread"])
def test_a_run_says_once_who_was_lost_where(rank_pool: RankPool, tmp_path: Path, overlap: bool) -> None:
    options = {"rank": 1, "example": 3}
    here = job(tmp_path, task__name="test_overlap:Leaving", task__options=options, transport__overlap=overlap)
    lost, cause = train_ranks(rank_pool, 2, here)
    assert (cause.kind, lost.kind, lost.step) == ("CheckpointError", "PeerLostError", 3)
    line = outcome.failure(_as_error(lost), 0, 2).line()
    pattern = (
        r"rank 0 on (\S+), step 3: rank 1 \(pid \d+, host \S+\) failed while rank 0 waited for it with .*, in bucket 0"
    )
    assert re.fullmatch(pattern, line), line
    assert line.count("step") == line.count("bucket") == line.count("pid") == 1
    assert lost.threads == cause.threads == 0


def _as_error(ended: TrainingEnded) -> PeerLostError:
    error = PeerLostError(ended.message)
    outcome.annotate(error, step=ended.step)
    return error
