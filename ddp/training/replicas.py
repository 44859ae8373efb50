"""Whether all ranks still have the same parameters: one checksum a rank, compared in the step's row.

The mean gradient is the same on all ranks, and so are the steps made of it: parameters differ only where memory, a
processor or a program went wrong, and nothing would ever make them equal again. The checksum is over bytes, so it
knows no tolerance: a NaN equals itself, and -0.0 is not 0.0. `replica_comparison` finds what differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BYTES = 8
ROW_WORDS = 1_024  # summed before they are weighted: sums pass at the speed of memory
JOINED_WORDS = 16_384  # parameters with fewer are joined
ODD = -7046029254386353131  # 2^64 divided by the golden ratio; odd times any change of one word is a change


@dataclass(frozen=True, slots=True)
class Suspects:
    """Ranks whose parameters differ from the others'; all ranks where there is no majority to tell."""

    ranks: tuple[int, ...]
    decided: bool

    def in_words(self) -> str:
        if not self.decided:
            return "the ranks' parameters differ, and no majority says whose are right"
        ranks = ", ".join(map(str, self.ranks))
        return f"the parameters of rank{'s' if len(self.ranks) > 1 else ''} {ranks} differ from those of the others"


def checksum(parameters: Iterable[Tensor]) -> int:
    """64 bits over all bytes of all parameters and their order, the same on every device.

    Any change within one word of eight bytes, so each single bit flip, changes it, and so does any of two words of
    one parameter; of all others one in 2^63 or so does not.
    """
    with torch.no_grad():
        sums = [each.cpu() for each in _by_device(parameters)]
    return sum(int(each) for each in sums) % 2**64


def checksums(parameters: Iterable[Tensor]) -> Tensor:
    """Shape (parameters,), int64 on the CPU: one number for each parameter's bytes."""
    with torch.no_grad():
        each = [_of_words(_words(parameter.detach())).cpu() for parameter in parameters]
    return torch.stack(each) if each else torch.zeros(0, dtype=torch.int64)


def halves(value: int) -> tuple[float, float]:
    """The high and the low 32 bits, which float64 holds exactly."""
    return float(value >> 32), float(value & 0xFFFF_FFFF)


def whole(high: float, low: float) -> int:
    """The inverse of `halves`."""
    return (int(high) << 32) | int(low)


def verdict(values: Sequence[int]) -> Suspects | None:
    """Who differs, by each rank's checksum; None where none does. The value that most ranks share is the right one."""
    (_, most), *others = Counter(values).most_common()
    if not others:
        return None
    if others[0][1] == most:
        return Suspects(tuple(range(len(values))), decided=False)
    right = Counter(values).most_common(1)[0][0]
    return Suspects(tuple(rank for rank, value in enumerate(values) if value != right), decided=True)


def _by_device(parameters: Iterable[Tensor]) -> list[Tensor]:
    """One sum over the parameters of each device, still there: nothing waits for it between two parameters.

    Small parameters are joined: each would cost more to begin with than to sum.
    """
    small: dict[torch.device, list[Tensor]] = {}
    sums: list[Tensor] = []
    for place, parameter in enumerate(parameters):
        words = _words(parameter.detach())
        if len(words) < JOINED_WORDS:
            small.setdefault(words.device, []).append(words)
        else:
            sums.append(_of_words(words) * _wrapped((2 * place + 1) * ODD))  # odd: no change is lost
    return sums + [_of_words(torch.cat(each)) for each in small.values()]


def _of_words(words: Tensor) -> Tensor:
    """An int64 of shape () on the device of `words`: the sums of its rows and of its columns, weighted.

    A row's weight is odd and a column's even, so a word's is odd: no change of one is lost. Two changes that make up
    for each other in the sum of a row are in two columns.
    """
    rows = len(words) // ROW_WORDS
    table, rest = words[: rows * ROW_WORDS].view(rows, ROW_WORDS), words[rows * ROW_WORDS :]
    places = torch.arange(max(rows, ROW_WORDS), device=words.device) * ODD * 2
    of_rows, of_columns = table.sum(dim=1) * (places[:rows] + 1), table.sum(dim=0) * places[:ROW_WORDS]
    of_rest = rest * (places[: len(rest)] + _wrapped((2 * rows + 1) * ODD))
    return of_rows.sum() + of_columns.sum() + of_rest.sum()


def _words(values: Tensor) -> Tensor:
    """The bytes of `values` in eights, (words,) int64, filled up with zeros; no copy where none is needed."""
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    data = values.resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    missing = -data.numel() % WORD_BYTES
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    if data.storage_offset() % WORD_BYTES:
        data = data.clone()
    return data.view(torch.int64)


def _wrapped(value: int) -> int:
    """`value` modulo 2^64 as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63
