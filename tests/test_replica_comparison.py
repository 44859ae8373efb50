"""Ranks whose parameters differ find out where, whose are wrong where that can be told, and rounding from damage."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddp.training.replica_comparison import BLOCK_ELEMENTS, Comparison, compare
from ranks import RankPool, process_group

Change = Callable[[int, list[tuple[str, Tensor]]], None]


def _parameters() -> list[tuple[str, Tensor]]:
    """Of a small network, the same on all ranks, with one frozen and some of other types."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 5, 3), nn.LayerNorm(12), nn.Linear(12, 3, dtype=torch.bfloat16))
    network[1].bias.requires_grad_(False)
    counts = ("counts", torch.arange(9))
    phases = ("phases", torch.randn(3, 4, dtype=torch.complex64))
    return [*network.named_parameters(), counts, phases, ("scale", torch.tensor(0.5)), ("none", torch.zeros(0, 3))]


def compared(rank: int, world_size: int, store_address: str, change: Change) -> Comparison | None:
    with process_group(rank, world_size, store_address):
        parameters = _parameters()
        with torch.no_grad():
            change(rank, parameters)
        return compare(parameters)


def _of(parameters: list[tuple[str, Tensor]], name: str) -> Tensor:
    return dict(parameters)[name]


def _flip(tensor: Tensor, index: tuple[int, ...], bit: int) -> None:
    """Also in a tensor that is not contiguous."""
    word = tensor[index].clone().reshape(1)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[word.element_size()]
    bits = word.view(kind)
    top = 8 * word.element_size() - 1
    bits ^= torch.tensor(-(1 << top) if bit == top else 1 << bit, dtype=kind)
    tensor[index] = word[0]


def nothing(rank: int, parameters: list[tuple[str, Tensor]]) -> None: ...


def exponent_bit_on_rank_1(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank == 1:
        _flip(_of(parameters, "0.weight"), (3, 0, 1, 1), 30)


def low_bit_on_rank_0(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank == 0:
        _flip(_of(parameters, "0.weight"), (3, 0, 1, 1), 0)


def a_tiny_value_on_rank_0(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    """Of a norm's weights, which are all one: the value is no outlier in magnitude but far from its tensor's."""
    if rank == 0:
        _of(parameters, "1.weight")[2] = 1e-38


def nan_on_rank_1(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank == 1:
        _of(parameters, "2.weight")[1, 4] = torch.nan


def a_count_on_rank_1(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank == 1:
        _of(parameters, "counts")[4] += 1 << 40


def a_scalar_on_the_last_rank(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank == torch.distributed.get_world_size() - 1:
        _of(parameters, "scale").fill_(0.25)


def a_phase_on_rank_1(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank == 1:
        _of(parameters, "phases")[2, 3] = torch.tensor(complex(1e30, 0.5))


def two_ranks_damaged(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank in (1, 2):
        _of(parameters, "0.bias")[rank] += 1.0


def halves_disagree(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    if rank in (1, 3):
        _of(parameters, "0.weight")[0, 0, 0, 0] = 1e9


def rounding(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    """Each rank's weights have gone their own way by a few units in the last place."""
    generator = torch.Generator().manual_seed(rank)
    for name in ("0.weight", "0.bias", "2.weight"):
        tensor = _of(parameters, name)
        epsilon = torch.finfo(tensor.dtype).eps
        tensor *= 1 + epsilon * torch.randint(-4, 5, tensor.shape, generator=generator).to(tensor.dtype)


def rounding_and_damage(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    rounding(rank, parameters)
    exponent_bit_on_rank_1(rank, parameters)


def beyond_one_block(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    long = torch.randn(BLOCK_ELEMENTS + 7, generator=torch.Generator().manual_seed(5))
    if rank == 1:
        long[-1] = 4e8
    parameters.append(("long", long))


def not_contiguous(rank: int, parameters: list[tuple[str, Tensor]]) -> None:
    turned = torch.randn(6, 4, generator=torch.Generator().manual_seed(5)).T
    if rank == 1:
        _flip(turned, (1, 5), 30)
    parameters.append(("turned", turned))


def _same_on_all(results: list[Comparison | None]) -> Comparison | None:
    assert all(result == results[0] for result in results)
    return results[0]


CASES = [
    # Three and more: the majority is right, whatever the value looks like.
    (3, exponent_bit_on_rank_1, (1,), r"parameter 0\.weight\[3, 0, 1, 1\] is -?\S+e\+3\d on rank 1 and \S+ on ranks 0, 2, one bit apart$"),
    (3, low_bit_on_rank_0, (0,), r"0\.weight\[3, 0, 1, 1\] is \S+ on rank 0 and \S+ on ranks 1, 2, one bit apart$"),
    (3, a_scalar_on_the_last_rank, (2,), r"parameter scale is 0\.25 on rank 2 and 0\.5 on ranks 0, 1$"),
    (4, two_ranks_damaged, (1, 2), r"0\.bias\[[12]\] is \S+ on rank [12] and \S+ on ranks 0, [12], 3; one more differs$"),
    (4, halves_disagree, (1, 3), r"0\.weight\[0, 0, 0, 0\] is 1e\+09 on ranks 1, 3 and \S+ on ranks 0, 2$"),
    # Two: only what is clear.
    (2, exponent_bit_on_rank_1, (1,), r"e\+3\d on rank 1 and"),
    (2, a_tiny_value_on_rank_0, (0,), r"1\.weight\[2\] is 1e-38 on rank 0 and 1 on rank 1"),
    (2, nan_on_rank_1, (1,), r"2\.weight\[1, 4\] is nan on rank 1 and \S+ on rank 0"),
    (2, a_count_on_rank_1, (1,), r"counts\[4\] is 1099511627780 on rank 1 and 4 on rank 0, one bit apart$"),
    (2, a_phase_on_rank_1, (1,), r"phases\[2, 3\] is 1e\+30\+0\.5j on rank 1 and"),
    (2, low_bit_on_rank_0, (), r"on rank 0 and .* on rank 1, one bit apart; which rank is right cannot be told"),
    (2, a_scalar_on_the_last_rank, (), r"parameter scale is 0\.5 on rank 0 and 0\.25 on rank 1.*cannot be told"),
    (2, beyond_one_block, (1,), rf"long\[{BLOCK_ELEMENTS + 6}\] is 4e\+08 on rank 1"),
    (2, not_contiguous, (1,), r"turned\[1, 5\] is"),
    (2, rounding_and_damage, (1,), r"0\.weight\[3, 0, 1, 1\] is .* on rank 1 and .*; \d+ more differ, in 3 parameters in all"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "change", "ranks", "text"), CASES, ids=lambda each: getattr(each, "__name__", None)
)
def test_damage_is_found(
    world_size: int, change: Change, ranks: tuple[int, ...], text: str, rank_pool: RankPool
) -> None:
    found = _same_on_all(rank_pool.run(world_size, compared, change))
    assert found is not None
    assert (found.ranks, found.drift) == (ranks, False), found.text
    assert re.search(text, found.text), found.text


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_replicas_that_are_equal_are_said_to_be(world_size: int, rank_pool: RankPool) -> None:
    assert rank_pool.run(world_size, compared, nothing) == [None] * world_size


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rounding_is_no_damage(world_size: int, rank_pool: RankPool) -> None:
    found = _same_on_all(rank_pool.run(world_size, compared, rounding))
    assert found is not None
    assert (found.ranks, found.drift) == ((), True), found.text
    assert "3 of 10 parameters differ a little" in found.text


def flips(rank: int, world_size: int, store_address: str) -> list[tuple[int, tuple[int, ...]]]:
    """For every bit of a weight: whom two ranks name where rank 1 has it flipped; () is undecided."""
    named: list[tuple[int, tuple[int, ...]]] = []
    with process_group(rank, world_size, store_address), torch.no_grad():
        for bit in range(32):
            weight = torch.randn(40, generator=torch.Generator().manual_seed(2))
            if rank == 1:
                _flip(weight, (17,), bit)
            found = compare([("weight", weight)])
            assert found is not None and not found.drift
            assert "one bit apart" in found.text
            named.append((bit, found.ranks))
    return named


def test_every_bit_is_found_and_none_is_blamed_on_the_wrong_rank(rank_pool: RankPool) -> None:
    answers = rank_pool.run(2, flips)
    assert answers[0] == answers[1]
    assert {ranks for _, ranks in answers[0]} == {(), (1,)}
    assert dict(answers[0])[30] == (1,)
