"""The comm hook through real DDP: averages, squared norms and errors, in every way DDP can be set up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp.errors import TransportError, UsageError
from ddp.transport.base import BucketState, Reduction
from ddp.transport.c10d import C10dTransport
from ddp.transport.comm_hook import GradientExchange, comm_hook, register
from ddp.transport.select import select_transport
from ranks import RankPool, process_group

ITERATIONS = 4
SIZES = ((7,), (5, 3), (11, 3, 2), (2, 9, 4, 6))  # examples of each rank, by number of ranks


class Network(nn.Module):
    """Six parameters of odd sizes; the last layer takes part only where `deep`, and one parameter never does."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 13), nn.Linear(13, 31), nn.Linear(31, 3)])
        self.spare = nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, inputs: Tensor, deep: bool) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return self.spare(inputs) if deep else inputs


def data(rank: int, iteration: int, examples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    return torch.randn(examples, 5, generator=generator).to(dtype), torch.randn(examples, 3, generator=generator).to(
        dtype
    )


def mean_loss(model: Callable[..., Tensor], batch: tuple[Tensor, Tensor], deep: bool) -> Tensor:
    return (model(batch[0], deep) - batch[1]).square().sum(dim=1).mean()


@dataclass(frozen=True)
class Case:
    """One way to set DDP up and to use it."""

    transport: str = "shared_memory"
    dtype: torch.dtype = torch.float32
    accumulation: int = 1
    deep: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def tolerance(self) -> float:
        return {torch.float64: 1e-12, torch.bfloat16: 2e-2}.get(self.dtype, 2e-6)


def _backwards(rank: int, world_size: int, store_address: str, case: Case) -> list[str]:
    """What differs from a single process that has all examples; several iterations, so that buckets are rebuilt."""
    sizes = SIZES[world_size - 1]
    faults: list[str] = []
    with process_group(rank, world_size, store_address):
        torch.manual_seed(0)
        model = DistributedDataParallel(Network(case.dtype), **case.options)
        exchange = GradientExchange(select_transport(case.transport, "cpu", 20.0))
        register(model, exchange, comm_hook)
        exchange.weight = sizes[rank] / sum(sizes)
        for iteration in range(ITERATIONS):
            mine = data(rank, iteration, sizes[rank], case.dtype)
            model.zero_grad()
            _accumulate(model, mine, case)
            sums = exchange.take()
            own, expected = _alone(model.module, mine, case), _whole_batch(model.module, sizes, iteration, case)
            faults += [
                f"iteration {iteration}: {name}: {a} and {b}"
                for name, a, b, tolerance in (
                    ("gradient", _flat(model.module), expected, case.tolerance()),
                    ("own norm", torch.tensor(sums.own_squared_norm, dtype=torch.float64), own @ own, case.tolerance()),
                    (
                        "mean norm",
                        torch.tensor(sums.mean_squared_norm, dtype=torch.float64),
                        _squared(model.module),
                        1e-6,
                    ),
                )
                if (a - b).norm() > tolerance * b.norm()
            ]
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
        elements = sum(parameter.numel() for parameter in model.parameters())
        if exchange.bytes_total != ITERATIONS * elements * case.dtype.itemsize:
            faults.append(f"{exchange.bytes_total} bytes for {elements} elements")
        exchange.transport.close()
    return faults


def _accumulate(model: DistributedDataParallel, batch: tuple[Tensor, Tensor], case: Case) -> None:
    """The gradient of the mean over this rank's batch, in `accumulation` uneven parts; all but the last unsynchronised."""
    examples = len(batch[0])
    cuts = [0, *range(1, case.accumulation), examples]
    for index, (start, stop) in enumerate(pairwise(cuts)):
        part = (batch[0][start:stop], batch[1][start:stop])
        loss = (stop - start) / examples
        if index < case.accumulation - 1:
            with model.no_sync():
                (loss * mean_loss(model, part, case.deep)).backward()
        else:
            (loss * mean_loss(model, part, case.deep)).backward()


def _alone(module: nn.Module, batch: tuple[Tensor, Tensor], case: Case) -> Tensor:
    """This rank's own gradient, by torch.autograd.grad, which fires no hook; float64."""
    parameters = list(module.parameters())
    loss = mean_loss(module, batch, case.deep)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).double().flatten()
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )


def _whole_batch(module: nn.Module, sizes: tuple[int, ...], iteration: int, case: Case) -> Tensor:
    """The gradient of the mean over all ranks' examples, in one process."""
    parts = [data(rank, iteration, size, case.dtype) for rank, size in enumerate(sizes)]
    whole = (torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts]))
    return _alone(module, whole, case)


def _flat(module: nn.Module) -> Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def _squared(module: nn.Module) -> Tensor:
    return _flat(module).square().sum()


TINY: dict[str, Any] = {"bucket_cap_mb": 0.0005}  # 131 elements: several buckets
CASES = {
    "plain": Case(),
    "double": Case(dtype=torch.float64),
    "many-buckets": Case(options=TINY),
    "views": Case(options={"gradient_as_bucket_view": True, **TINY}),
    "accumulated": Case(accumulation=2),
    "accumulated-views": Case(accumulation=2, options={"gradient_as_bucket_view": True, **TINY}),
    "static": Case(options={"static_graph": True, **TINY}),
    "unused": Case(deep=False, options={"find_unused_parameters": True, **TINY}),
    "unused-double": Case(deep=False, dtype=torch.float64, options={"find_unused_parameters": True}),
    "unused-views": Case(deep=False, options={"find_unused_parameters": True, "gradient_as_bucket_view": True}),
    "c10d": Case(transport="c10d", options=TINY),
    "c10d-unused": Case(transport="c10d", deep=False, options={"find_unused_parameters": True}),
    "c10d-static": Case(transport="c10d", options={"static_graph": True, **TINY}),
    "bfloat16": Case(transport="c10d", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_average_is_the_gradient_of_the_whole_batch(rank_pool: RankPool, world_size: int, case: Case) -> None:
    assert rank_pool.run(world_size, _backwards, case) == [[]] * world_size


def _bfloat16(rank: int, world_size: int, store_address: str) -> tuple[list[str], list[str]]:
    with _messages() as messages:
        faults = _backwards(rank, world_size, store_address, Case(dtype=torch.bfloat16, options=TINY))
    return faults, messages


@contextmanager
def _messages() -> Iterator[list[str]]:
    """What the transports log meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ddp.transport")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def test_bfloat16_goes_through_c10d_and_says_so_once(rank_pool: RankPool) -> None:
    (faults, messages), *others = rank_pool.run(3, _bfloat16)
    assert faults == [] and len(messages) == 1
    assert "bfloat16" in messages[0] and "c10d" in messages[0]
    assert others == [([], [])] * 2


class Broken(C10dTransport):
    """Raises on one bucket of one rank."""

    def __init__(self, rank: int, bucket: int) -> None:
        super().__init__(None, None)
        self.left = bucket if dist.get_rank() == rank else -1

    def all_reduce_mean_(self, bucket: Tensor, weight: float, state: BucketState | None = None) -> Reduction:
        self.left -= 1
        if self.left == -1:
            raise TransportError("the cable is out")
        return super().all_reduce_mean_(bucket, weight, state)


def _broken(rank: int, world_size: int, store_address: str) -> tuple[str, str, int]:
    with process_group(rank, world_size, store_address, timeout=2.0):
        torch.manual_seed(0)
        model = DistributedDataParallel(Network(), **TINY)
        exchange = GradientExchange(Broken(rank=-1, bucket=0))
        register(model, exchange, comm_hook)
        for iteration in range(2):  # until the buckets are small
            mean_loss(model, data(rank, iteration, 3, torch.float32), deep=True).backward()
        buckets = len(exchange.detach())
        exchange.transport = Broken(rank=0, bucket=1)
        try:
            mean_loss(model, data(rank, 2, 3, torch.float32), deep=True).backward()
            raised = "nothing in backward"
        except RuntimeError as error:  # rank 1 waits in vain for the buckets that rank 0 does not bring
            raised = type(error).__name__
        try:
            exchange.take()
        except TransportError as error:
            return str(error), raised, buckets
        return "", raised, buckets


def test_an_error_in_the_hook_is_itself_right_after_backward(rank_pool: RankPool) -> None:
    (message, raised, buckets), _ = rank_pool.run(2, _broken)
    assert (message, raised) == ("the cable is out, in bucket 1 of backward 3", "nothing in backward")
    assert buckets >= 3


def _second_hook(rank: int, world_size: int, store_address: str) -> str:
    with process_group(rank, world_size, store_address):
        model = DistributedDataParallel(Network())
        exchange = GradientExchange(C10dTransport(None, None))
        register(model, exchange, comm_hook)
        try:
            register(model, exchange, comm_hook)
        except UsageError as error:
            return str(error)
    return ""


def test_a_second_hook_is_refused(rank_pool: RankPool) -> None:
    (message,) = rank_pool.run(1, _second_hook)
    assert "already has a communication hook" in message and "ddp.attach" in message
