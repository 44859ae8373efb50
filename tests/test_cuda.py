"""Where there is a GPU: NCCL moves the gradients, the norms stay on the device, nothing makes the host wait for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp.job import parse_job
from ddp.process_group import initialise, shutdown
from ddp.topology import Topology
from ddp.transport.base import BucketState
from ddp.transport.comm_hook import GradientExchange, comm_hook, register
from ddp.transport.select import select_transport
from ranks import run_ranks
from training_runs import agent_environment, losses_of, train_one

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICES = torch.cuda.device_count()
WORLD_SIZES = [ranks for ranks in (1, 2, 4) if ranks <= DEVICES]
LENGTHS = (1, 77, 8193, 100_003)


def _open(rank: int, world_size: int, store: str) -> torch.device:
    host, _, port = store.rpartition(":")
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    initialise(Topology(rank, world_size, rank, world_size, launcher="torchrun"), "cuda", 60.0)
    return device


def _gradient(rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return ((rank + 1) * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)).to(dtype)


def _weight(rank: int, world_size: int) -> float:
    return 2 * (rank + 1) / (world_size * (world_size + 1))


def _average(rank: int, world_size: int, store: str, dtype: torch.dtype) -> Any:
    device = _open(rank, world_size, store)
    transport = select_transport("auto", "cuda", 60.0)
    state, bucket = BucketState.of(LENGTHS), _gradient(rank, dtype).to(device)
    reduction = transport.all_reduce_mean_(bucket, _weight(rank, world_size), state)
    transport.complete()
    assert reduction.future is not None
    averaged = reduction.future.wait().cpu()
    assert isinstance(reduction.own_squared_norm, Tensor) and reduction.own_squared_norm.is_cuda
    assert isinstance(state.own_squared_norms, Tensor) and isinstance(state.mean_squared_norms, Tensor)
    norms = [state.own_squared_norms.tolist(), state.mean_squared_norms.tolist()]
    totals = [float(reduction.own_squared_norm), float(reduction.mean_squared_norm)]
    shutdown()
    return averaged, norms, totals


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nccl_averages_and_the_norms_are_of_every_parameter(world_size: int, dtype: torch.dtype) -> None:
    gradients = [_gradient(rank, dtype).double() for rank in range(world_size)]
    expected = torch.stack([_weight(rank, world_size) * each for rank, each in enumerate(gradients)]).sum(0)
    tolerance = 4 * world_size * torch.finfo(dtype).eps
    for rank, (averaged, (own, mean), totals) in enumerate(run_ranks(world_size, _average, dtype, timeout=120)):
        assert torch.allclose(averaged.double(), expected, rtol=tolerance, atol=tolerance)
        assert own == pytest.approx([float(part.square().sum()) for part in gradients[rank].split(LENGTHS)], rel=1e-5)
        assert mean == pytest.approx(
            [float(part.double().square().sum()) for part in averaged.split(LENGTHS)], rel=1e-5
        )
        assert totals == pytest.approx([sum(own), sum(mean)], rel=1e-9)


def _backward_without_waiting(rank: int, world_size: int, store: str) -> bool:
    device = _open(rank, world_size, store)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8)).to(device))
    exchange = GradientExchange(select_transport("auto", "cuda", 60.0))
    register(model, exchange, comm_hook)
    exchange.prepare(model)
    inputs = torch.randn(16, 64, device=device)
    for _ in range(3):  # buckets are rebuilt after the first
        model(inputs).square().mean().backward()
        exchange.take()
    torch.cuda.set_sync_debug_mode("error")  # from here on whatever makes the host wait raises
    model(inputs).square().mean().backward()
    exchange.raise_error()
    torch.cuda.set_sync_debug_mode("default")
    finite = bool(np.isfinite(exchange.take().mean_squared_norm))
    dist.barrier()
    shutdown()
    return finite


def test_the_hook_does_not_wait_for_the_device() -> None:
    assert run_ranks(WORLD_SIZES[-1], _backward_without_waiting, timeout=120) == [True] * WORLD_SIZES[-1]


def _train(rank: int, world_size: int, store: str, folder: str, device: str) -> str:
    table = {
        "run": {"id": device, "directory": folder, "device": device, "threads_per_rank": 1, "steps": 20},
        "task": {"name": "digits"},
        "batch": {"global_batch_size": 32, "micro_batch_size": 32},
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "metrics": {"enabled": False},
        "evaluation": {"metric": "accuracy"},
    }
    with agent_environment(store):
        return train_one(rank, world_size, store, [parse_job(table)] * world_size, None).message


def test_a_run_on_the_gpu_has_the_losses_of_one_on_the_cpu(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        assert run_ranks(1, _train, str(tmp_path), device, timeout=180) == [""]
    assert losses_of(tmp_path / "cuda") == pytest.approx(losses_of(tmp_path / "cpu"), rel=1e-3)
