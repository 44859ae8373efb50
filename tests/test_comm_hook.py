"""The comm hook through real DDP: averages, squared norms and errors, in every way DDP can be set up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
EXAMPLES = (5, 3, 11, 2)  # of each rank


class Network(nn.Module):
    """Six parameters of odd sizes; the last layer takes part only where `deep`, and one parameter never does."""

    def __init__(self, dtype: torch.dtype = torch.float32, middle: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 13), nn.Linear(13, 31), nn.Linear(31, 3)])
        self.spare = nn.Linear(3, 3)
        self.to(dtype)
        self.layers[1].to(middle or dtype)

    def forward(self, inputs: Tensor, deep: bool) -> Tensor:
        dtype = inputs.dtype
        for layer in self.layers:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            inputs = torch.tanh(layer(inputs.to(weight.dtype)))
        return self.spare(inputs.to(dtype)) if deep else inputs.to(dtype)


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
    middle: torch.dtype | None = None
    accumulation: int = 1
    shallow_ranks: tuple[int, ...] = ()  # which leave the last layer out
    options: dict[str, Any] = field(default_factory=dict)

    def tolerance(self) -> float:
        if torch.bfloat16 in (self.dtype, self.middle):
            return 2e-2
        return 1e-12 if self.dtype == torch.float64 else 2e-6

    def is_deep(self, rank: int) -> bool:
        return rank not in self.shallow_ranks


@dataclass(frozen=True)
class Team:
    """The ranks that train one model; `weights` by rank."""

    rank: int
    weights: dict[int, float]
    overlap: bool
    group: dist.ProcessGroup | None = None


class Session:
    """One model of a team through a few iterations, compared with a single process that has all examples."""

    def __init__(self, case: Case, team: Team) -> None:
        torch.manual_seed(0)
        self.case, self.team = case, team
        self.model = DistributedDataParallel(Network(case.dtype, case.middle), process_group=team.group, **case.options)
        self.exchange = GradientExchange(
            select_transport(case.transport, "cpu", 20.0, team.group, overlap=team.overlap)
        )
        register(self.model, self.exchange, comm_hook)
        self.exchange.prepare(self.model)
        self.exchange.weight = team.weights[team.rank]
        self.faults: list[str] = []

    def batch(self, rank: int, iteration: int) -> tuple[Tensor, Tensor]:
        return data(rank, iteration, EXAMPLES[rank], self.case.dtype)

    def check(self, iteration: int) -> None:
        """After a backward: gradients, both norms, and each parameter's."""
        module, case, rank = self.model.module, self.case, self.team.rank
        sums = self.exchange.take()
        own = _alone(module, self.batch(rank, iteration), case.is_deep(rank))
        expected = sum(
            (
                weight * _flat(_alone(module, self.batch(other, iteration), case.is_deep(other)))
                for other, weight in self.team.weights.items()
            ),
            torch.zeros(()),
        )
        mean = [_or_zero(parameter.grad, parameter) for parameter in module.parameters()]
        self._compare(f"{iteration}: gradient", _flat(mean), expected, case.tolerance())
        self._compare(f"{iteration}: own norm", sums.own_squared_norm, _flat(own).square().sum(), case.tolerance())
        self._compare(f"{iteration}: mean norm", sums.mean_squared_norm, _flat(mean).square().sum(), 1e-6)
        found = sums.by_parameter()
        each = [found[parameter] for parameter in module.parameters()]
        for index, tolerance, gradients in ((0, 4 * case.tolerance(), own), (1, 2e-6, mean)):
            for place, gradient in enumerate(gradients):
                name = f"{iteration}: parameter {place}, {('own', 'mean')[index]}"
                self._compare(name, each[place][index], gradient.square().sum(), tolerance)

    def update(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)

    def close(self) -> list[str]:
        elements = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        if self.exchange.bytes_total != ITERATIONS * elements:
            self.faults.append(f"{self.exchange.bytes_total} bytes in {ITERATIONS} iterations of {elements}")
        self.exchange.transport.close()
        return self.faults

    def _compare(self, name: str, found: Tensor | float, expected: Tensor, tolerance: float) -> None:
        difference = (torch.as_tensor(found, dtype=torch.float64) - expected).norm()
        if not difference <= tolerance * expected.norm() + 1e-300:
            self.faults.append(f"iteration {name}: {found} instead of {expected}")


def _team(rank: int, ranks: Sequence[int], overlap: bool, group: dist.ProcessGroup | None = None) -> Team:
    total = sum(EXAMPLES[other] for other in ranks)
    return Team(rank, {other: EXAMPLES[other] / total for other in ranks}, overlap, group)


def _session(case: Case, team: Team) -> list[str]:
    """What differs; several iterations, so that buckets are rebuilt."""
    session = Session(case, team)
    for iteration in range(ITERATIONS):
        session.model.zero_grad()
        _accumulate(session.model, session.batch(team.rank, iteration), case, case.is_deep(team.rank))
        session.check(iteration)
        session.update()
    return session.close()


def _backwards(rank: int, world_size: int, store_address: str, cases: dict[str, Case], overlap: bool) -> list[str]:
    with process_group(rank, world_size, store_address):
        team = _team(rank, range(world_size), overlap)
        return [f"{name}: {fault}" for name, case in cases.items() for fault in _session(case, team)]


def _accumulate(model: DistributedDataParallel, batch: tuple[Tensor, Tensor], case: Case, deep: bool) -> None:
    """The gradient of the mean over this rank's batch, in `accumulation` uneven parts; all but the last unsynchronised."""
    examples = len(batch[0])
    cuts = [0, *range(1, case.accumulation), examples]
    for index, (start, stop) in enumerate(pairwise(cuts)):
        part = (batch[0][start:stop], batch[1][start:stop])
        loss = (stop - start) / examples
        if index < case.accumulation - 1:
            with model.no_sync():
                (loss * mean_loss(model, part, deep)).backward()
        else:
            (loss * mean_loss(model, part, deep)).backward()


def _alone(module: nn.Module, batch: tuple[Tensor, Tensor], deep: bool) -> list[Tensor]:
    """One rank's own gradients, by torch.autograd.grad, which fires no hook; float64."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(mean_loss(module, batch, deep), parameters, allow_unused=True)
    return [_or_zero(gradient, parameter) for gradient, parameter in zip(gradients, parameters, strict=True)]


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().double()


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


TINY: dict[str, Any] = {"bucket_cap_mb": 0.0005}  # 131 elements: several buckets
ALL_SHALLOW = (0, 1, 2, 3)
WAYS = {
    "plain": Case(),
    "double": Case(dtype=torch.float64),
    "bfloat16": Case(dtype=torch.bfloat16),
    "mixed": Case(middle=torch.bfloat16, options=TINY),
    "many buckets": Case(options=TINY),
    "views": Case(options={"gradient_as_bucket_view": True, **TINY}),
    "accumulated": Case(accumulation=2),
    "accumulated views": Case(accumulation=2, options={"gradient_as_bucket_view": True, **TINY}),
    "static": Case(options={"static_graph": True, **TINY}),
    "unused": Case(shallow_ranks=ALL_SHALLOW, options={"find_unused_parameters": True, **TINY}),
    "unused double": Case(shallow_ranks=ALL_SHALLOW, dtype=torch.float64, options={"find_unused_parameters": True}),
    "unused on some": Case(shallow_ranks=(0, 2), options={"find_unused_parameters": True, **TINY}),
    "unused views": Case(shallow_ranks=(1,), options={"find_unused_parameters": True, "gradient_as_bucket_view": True}),
}
CASES = {
    f"{transport}, {name}": replace(case, transport=transport)
    for transport in ("shared_memory", "c10d")
    for name, case in WAYS.items()
}


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_average_is_the_gradient_of_the_whole_batch(rank_pool: RankPool, world_size: int, overlap: bool) -> None:
    assert rank_pool.run(world_size, _backwards, CASES, overlap) == [[]] * world_size


def _several(rank: int, world_size: int, store_address: str, transport: str, overlap: bool) -> list[str]:
    """Two models whose buckets alternate in one backward, then each one's alone, the second's first."""
    with process_group(rank, world_size, store_address):
        team = _team(rank, range(world_size), overlap)
        sessions = [
            Session(Case(transport, options=TINY), team),
            Session(Case(transport, options={"gradient_as_bucket_view": True}), team),
        ]
        for iteration in range(ITERATIONS):
            losses = [mean_loss(each.model, each.batch(rank, iteration), deep=True) for each in sessions]
            for backward in [losses[0] + losses[1]] if iteration % 2 else losses[::-1]:
                backward.backward()
            for session in sessions:
                session.check(iteration)
                session.update()
                session.model.zero_grad()
        return [fault for session in sessions for fault in session.close()]


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
def test_several_models_at_once(rank_pool: RankPool, transport: str, overlap: bool) -> None:
    assert rank_pool.run(2, _several, transport, overlap) == [[]] * 2


def _subgroups(rank: int, world_size: int, store_address: str, overlap: bool) -> list[str]:
    faults: list[str] = []
    with process_group(rank, world_size, store_address):
        for parts in ([[0, 2], [1, 3]], [[0, 1, 3], [2]]):
            groups = [(ranks, dist.new_group(ranks)) for ranks in parts]
            for ranks, group in groups:
                if rank in ranks:
                    assert isinstance(group, dist.ProcessGroup)
                    for transport in ("shared_memory", "c10d"):
                        faults += _session(Case(transport, options=TINY), _team(rank, ranks, overlap, group))
        dist.barrier()
    return faults


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "thread"])
def test_models_on_some_of_the_ranks(rank_pool: RankPool, overlap: bool) -> None:
    assert rank_pool.run(4, _subgroups, overlap) == [[]] * 4


class Phases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.tensor([1.0 + 2.0j, 3.0j, -1.0]))
        self.scales = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, factor: float) -> Tensor:
        return factor * torch.view_as_real(self.phases).square().sum() + self.scales.square().sum()


def _complex(rank: int, world_size: int, store_address: str) -> tuple[list[complex], list[tuple[float, float]]]:
    with process_group(rank, world_size, store_address):
        model = DistributedDataParallel(Phases())
        exchange = GradientExchange(select_transport("shared_memory", "cpu", 20.0))
        register(model, exchange, comm_hook)
        model(1.0 + rank).backward()
        sums = exchange.take().by_parameter()
        dist.barrier()
        exchange.transport.close()
        assert model.module.phases.grad is not None
        return model.module.phases.grad.tolist(), [sums[parameter] for parameter in model.module.parameters()]


def test_complex_parameters_are_pairs_of_real_ones(rank_pool: RankPool) -> None:
    for rank, (gradient, sums) in enumerate(rank_pool.run(2, _complex)):
        assert gradient == [3.0 + 6.0j, 9.0j, -3.0]  # 2 * 1.5 * the parameter
        assert sums[0] == pytest.approx((4 * (1 + rank) ** 2 * 15, 9 * 15))
        assert sums[1] == pytest.approx((52, 52))


def _other_type(rank: int, world_size: int, store_address: str) -> str:
    with process_group(rank, world_size, store_address):
        exchange = GradientExchange(select_transport("shared_memory", "cpu", 20.0))
        exchange.transport.dtypes = frozenset({torch.float64})  # DDP itself makes no buckets of 8 bits
        model = DistributedDataParallel(nn.Linear(2, 1))
        register(model, exchange, comm_hook)
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(UsageError) as caught:
            exchange.take()
        exchange.transport.close()
        return str(caught.value)


def test_gradients_that_the_transport_does_not_take_are_refused(rank_pool: RankPool) -> None:
    assert all("float32 gradients are not averaged" in message for message in rank_pool.run(2, _other_type))


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
