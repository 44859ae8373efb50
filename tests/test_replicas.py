"""A checksum over bytes notices any flipped bit, and says which rank has it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from ddp.training import replicas
from ddp.training.replicas import JOINED_WORDS, ODD, ROW_WORDS, Suspects, checksum, checksums, halves, verdict, whole

DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
]


def _tensor(elements: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(elements, generator=generator) > 0.5
    if dtype.is_complex or dtype.is_floating_point:
        return torch.randn(elements, generator=generator, dtype=torch.complex128 if dtype.is_complex else None).to(
            dtype
        )
    return torch.randint(0, 100, (elements,), generator=generator).to(dtype)


def _bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.view(-1)
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(torch.uint8).view(-1)


def _reference(parameters: list[Tensor]) -> int:
    """The same in Python's own integers, word by word."""
    small: list[int] = []
    total = 0
    for place, parameter in enumerate(parameters):
        data = bytes(_bytes(parameter).tolist())
        words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
        if len(words) < JOINED_WORDS:
            small += words
        else:
            total += _weighted(words) * (2 * place + 1) * ODD
    return (total + _weighted(small)) % 2**64


def _weighted(words: list[int]) -> int:
    rows = len(words) // ROW_WORDS
    weights = [
        2 * ODD * row + 1 + 2 * ODD * column if row < rows else 2 * ODD * column + (2 * rows + 1) * ODD
        for row, column in (divmod(i, ROW_WORDS) for i in range(len(words)))
    ]
    return sum(word * weight for word, weight in zip(words, weights, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [0, 1, 3, 17, 4_099, 140_001])
def test_it_is_the_sum_that_it_says(dtype: torch.dtype, elements: int) -> None:
    parameters = [_tensor(elements, dtype), _tensor(elements, dtype, 1), torch.tensor(1.5)]
    assert checksum(parameters) == _reference(parameters)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != torch.bool], ids=str)
def test_any_flipped_bit_changes_it(dtype: torch.dtype) -> None:
    """Every bit of some elements, the first and the last among them; many words, one word, less than one."""
    for elements in (9_001, 5, 1):
        tensor = _tensor(elements, dtype)
        before, data = checksum([torch.ones(3), tensor]), _bytes(tensor)
        size = len(data) // elements
        for element in {0, elements // 2, elements - 1, random.Random(1).randrange(elements)}:
            for place in range(element * size, (element + 1) * size):
                for bit in range(8):
                    data[place] ^= 1 << bit
                    assert checksum([torch.ones(3), tensor]) != before, (elements, place, bit)
                    data[place] ^= 1 << bit
        assert checksum([torch.ones(3), tensor]) == before


def test_bytes_count_and_not_values() -> None:
    nan = torch.tensor([float("nan")])
    assert checksum([nan]) == checksum([nan.clone()])
    assert checksum([torch.tensor([0.0])]) != checksum([torch.tensor([-0.0])])


def test_layout_does_not_count() -> None:
    flat = torch.randn(1 + 6 * 7)
    view = flat[1:].view(6, 7)  # four bytes off a word
    assert checksum([view]) == checksum([view.clone()])
    assert checksum([view.T]) == checksum([view.T.contiguous()]) != checksum([view])
    wide = torch.randn(6, 14)[:, ::2]
    assert checksum([wide]) == checksum([wide.clone()])
    conjugate = torch.randn(5, dtype=torch.complex64).conj()
    assert checksum([conjugate]) == checksum([conjugate.resolve_conj()])
    assert checksum([conjugate.imag]) == checksum([conjugate.imag.resolve_neg()])
    assert checksum([torch.nn.Parameter(view)]) == checksum([view])


def test_order_counts() -> None:
    one, other = torch.randn(4_096), torch.randn(4_096)
    assert checksum([one, other]) != checksum([other, one])
    swapped = torch.cat([one[2_048:], one[:2_048]])
    assert checksum([swapped]) != checksum([one])


def test_no_parameters_are_equal_everywhere() -> None:
    assert checksum([]) == 0
    assert checksums([]).shape == (0,)


def test_random_damage_is_noticed() -> None:
    """Several changes at once, which might cancel: they do not in thousands of tries."""
    source = np.random.default_rng(0)
    tensor = torch.randn(3_000)
    before, words = checksum([tensor]), tensor.view(torch.int32).numpy()
    for _ in range(3_000):
        places = source.choice(3_000, size=source.integers(2, 6), replace=False)
        flips = (1 << source.integers(0, 31, size=len(places))).astype(np.int32)
        words[places] ^= flips
        assert checksum([tensor]) != before
        words[places] ^= flips


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_halves_travel_exactly(value: int) -> None:
    row = np.array(halves(value))
    assert whole(*row.tolist()) == value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7], None),
        ([7, 7, 7, 7], None),
        ([7, 8], Suspects((0, 1), decided=False)),
        ([7, 8, 7], Suspects((1,), decided=True)),
        ([8, 7, 7, 7], Suspects((0,), decided=True)),
        ([7, 7, 8, 8], Suspects((0, 1, 2, 3), decided=False)),
        ([7, 8, 9], Suspects((0, 1, 2), decided=False)),
        ([7, 8, 9, 7], Suspects((1, 2), decided=True)),
    ],
)
def test_the_majority_is_right(values: list[int], expected: Suspects | None) -> None:
    assert verdict(values) == expected


def test_a_verdict_is_said_in_words() -> None:
    assert Suspects((1,), True).in_words() == "the parameters of rank 1 differ from those of the others"
    assert Suspects((1, 2), True).in_words() == "the parameters of ranks 1, 2 differ from those of the others"
    assert "no majority" in Suspects((0, 1), False).in_words()


def test_one_number_a_parameter_finds_the_parameter() -> None:
    parameters = [torch.randn(5), torch.randn(2, 3), torch.tensor(1.0)]
    before = checksums(parameters)
    parameters[1][1, 2] += 1.0
    assert (checksums(parameters) != before).tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_gives_the_same(dtype: torch.dtype) -> None:
    for elements in (0, 1, 17, 300_001):
        tensors = [_tensor(elements, dtype), torch.randn(3)]
        assert replicas.checksum([each.cuda() for each in tensors]) == checksum(tensors)
        assert checksum([tensors[0].cuda(), tensors[1]]) == checksum(tensors)
