"""What differs between ranks whose checksums differ, and which rank has it wrong. Runs only then: it moves whole tensors.

Three ranks and more have a majority. Of two, one is named only where its value lies far from its own tensor's while
the other's does not. Many elements that differ by a little are not damage but rounding, as on unlike processors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddp.training.replicas import checksums

BLOCK_ELEMENTS = 1 << 20  # gathered at a time
EXAMINED_PARAMETERS = 8  # of those that differ
KEPT_ELEMENTS = 16  # of a parameter
FEWEST_DRIFTING = 3  # elements that differ by rounding; one or two are damage
FEWEST_COMPARED = 8  # elements to tell an implausible value by
CLOSE = 0.01  # of the parameter's size: elements that agree
FAR = 10.0  # times the width of what agrees, beyond its ends


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs. `ranks` have it wrong, as far as that can be told; () where it cannot."""

    ranks: tuple[int, ...]
    drift: bool  # rounding, not damage
    text: str  # one sentence


@dataclass(frozen=True, slots=True)
class Element:
    """One element that is not the same on all ranks: its value and its bytes on each."""

    index: tuple[int, ...]
    values: tuple[Any, ...]
    patterns: tuple[bytes, ...]
    apart: float  # the largest difference between two ranks


@dataclass
class Examined:
    """One parameter that differs."""

    name: str
    differing: int = 0
    largest_difference: float = 0.0  # between two ranks
    sum_of_squares: float = 0.0  # of each element's smallest magnitude: one huge value leaves it as it is
    elements: int = 0
    agreed: int = 0  # elements that are the same or nearly
    low: float = math.inf  # of those
    high: float = -math.inf
    kept: tuple[Element, ...] = ()  # those farthest apart, the farthest first

    @property
    def relative_difference(self) -> float:
        """The largest, as a share of the root mean square of the parameter."""
        size = math.sqrt(self.sum_of_squares / max(self.elements, 1))
        return self.largest_difference / size if size > 0 else math.inf


def compare(
    parameters: Iterable[tuple[str, Tensor]], process_group: dist.ProcessGroup | None = None
) -> Comparison | None:
    """Find what differs between ranks; None where nothing does. Collective, and the same on all ranks.

    Args:
        parameters: names and tensors, as `named_parameters` gives them, in the same order on all ranks.
        process_group: one that has a backend for the CPU; the default one where left out.
    """
    named = list(parameters)
    sums = torch.stack(_gathered(checksums(each for _, each in named), process_group))
    places = (sums != sums[0]).any(dim=0).nonzero().flatten().tolist()
    if not places:
        return None
    epsilon = max(_epsilon(named[place][1]) for place in places)
    examined = [
        _examine(name, each, process_group) for name, each in (named[place] for place in places[:EXAMINED_PARAMETERS])
    ]
    if _is_drift(examined, epsilon):
        return Comparison((), True, _drift_text(examined, len(places), len(named)))
    ranks = _by_majority(sums[:, places]) or _by_plausibility(examined)
    return Comparison(ranks, False, _damage_text(examined, ranks, len(places)))


def _gathered(own: Tensor, process_group: dist.ProcessGroup | None) -> list[Tensor]:
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, own, group=process_group)
    return everyone


def _examine(name: str, parameter: Tensor, process_group: dist.ProcessGroup | None) -> Examined:
    found = Examined(name)
    flat = parameter.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    for start in range(0, flat.numel(), BLOCK_ELEMENTS):
        own = flat[start : start + BLOCK_ELEMENTS].cpu().contiguous()
        data = torch.stack(_gathered(_as_bytes(own), process_group))  # (ranks, elements, bytes)
        values = torch.stack([_from_bytes(each, own.dtype) for each in data])
        _enter(found, data, values, start, tuple(parameter.shape))
    return found


def _as_bytes(values: Tensor) -> Tensor:
    """Shape (elements, bytes of one)."""
    if values.is_complex():
        values = torch.view_as_real(values)
    return values.contiguous().view(torch.uint8).reshape(len(values), -1).clone()


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_as_bytes`."""
    return data.reshape(-1).clone().view(dtype)


def _enter(found: Examined, data: Tensor, values: Tensor, start: int, shape: tuple[int, ...]) -> None:
    """Add one block, (ranks, elements) of `values`, whose first element has the flat index `start`."""
    differs = (data != data[0]).any(dim=2).any(dim=0)
    wide = _real(values)
    apart = (wide.amax(dim=0) - wide.amin(dim=0)).nan_to_num(math.inf, math.inf).where(differs, 0.0)
    squares = wide.abs().nan_to_num(math.inf).amin(dim=0).nan_to_num(0.0, 0.0, 0.0).square()
    agreeing = wide[0, apart <= CLOSE * squares.mean().sqrt()]
    agreeing = agreeing[agreeing.isfinite()]
    found.elements += wide.shape[1]
    found.agreed += len(agreeing)
    found.sum_of_squares += float(squares.sum())
    if len(agreeing):
        found.low, found.high = min(found.low, float(agreeing.min())), max(found.high, float(agreeing.max()))
    differing = int(differs.sum())
    found.differing += differing
    found.largest_difference = max(found.largest_difference, float(apart.max()))
    order = apart.where(differs, -1.0).topk(min(KEPT_ELEMENTS, differing)).indices.tolist()  # -0.0 and 0.0 are 0 apart
    new = [
        Element(
            index=_index(start + place, shape),
            values=tuple(values[:, place].tolist()),
            patterns=tuple(bytes(each.tolist()) for each in data[:, place]),
            apart=float(apart[place]),
        )
        for place in order
    ]
    found.kept = tuple(sorted([*found.kept, *new], key=lambda each: -each.apart)[:KEPT_ELEMENTS])


def _real(values: Tensor) -> Tensor:
    """As float64; a complex number by whichever of its parts is larger, so that all is told by one number."""
    if values.is_complex():
        parts = torch.view_as_real(values).double()
        return parts.gather(-1, parts.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    return values.double()


def _index(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.insert(0, rest)
    return tuple(index)


def _epsilon(parameter: Tensor) -> float:
    floating = parameter.is_floating_point() or parameter.is_complex()
    return torch.finfo(parameter.dtype).eps if floating else 0.0


def _is_drift(examined: Sequence[Examined], epsilon: float) -> bool:
    """Whether there are several differences and all are small for their tensors."""
    if epsilon == 0.0 or sum(each.differing for each in examined) < FEWEST_DRIFTING:
        return False
    return all(each.relative_difference <= 1e-3 + 16 * epsilon for each in examined)


def _by_majority(sums: Tensor) -> tuple[int, ...]:
    """The ranks that are outvoted on some parameter, (ranks, parameters); () where one has no majority."""
    wrong: set[int] = set()
    for column in sums.T.tolist():
        (right, most), *others = Counter(column).most_common()
        if others[0][1] == most:
            return ()
        wrong.update(rank for rank, value in enumerate(column) if value != right)
    return tuple(sorted(wrong)) if len(wrong) < len(sums) else ()


def _by_plausibility(examined: Sequence[Examined]) -> tuple[int, ...]:
    """The ranks with a value far from its own tensor's where others have one amid them; () unless that is clear."""
    wrong, right = set[int](), set[int]()
    for parameter in examined:
        if parameter.agreed < FEWEST_COMPARED:
            continue
        for element in parameter.kept:
            places = [_outside(parameter, value) for value in element.values]
            far = {rank for rank, outside in enumerate(places) if outside > FAR}
            near = {rank for rank, outside in enumerate(places) if outside <= 1.0}
            if far and near and len(far) + len(near) == len(places):
                wrong, right = wrong | far, right | near
    return tuple(sorted(wrong)) if wrong and not wrong & right else ()


def _outside(parameter: Examined, value: Any) -> float:
    """How far `value` lies beyond what agrees, in widths of that; 0 within."""
    number = float(_real(torch.tensor([value]))[0])
    if not math.isfinite(number):
        return math.inf
    beyond = max(parameter.low - number, number - parameter.high, 0.0)
    width = parameter.high - parameter.low
    return beyond / width if width > 0 else math.inf if beyond else 0.0


def _drift_text(examined: Sequence[Examined], different: int, of: int) -> str:
    largest = max(each.relative_difference for each in examined)
    elements = sum(each.differing for each in examined)
    more = f" in the first {len(examined)}" if len(examined) < different else ""
    return (
        f"{different:,} of {of:,} parameters differ a little between ranks, {elements:,} elements{more}, by {largest:.1g} "
        "of their tensors' size at most: rounding, as where ranks have unlike processors or libraries, and no damage"
    )


def _damage_text(examined: Sequence[Examined], ranks: Sequence[int], different: int) -> str:
    first = max(examined, key=lambda each: each.relative_difference)
    element = first.kept[0]
    where = f"[{', '.join(map(str, element.index))}]" if element.index else ""
    text = f"parameter {first.name}{where} is {_values_text(element, ranks)}"
    if _differ_in_one_bit(element):
        text += ", one bit apart"
    others = sum(each.differing for each in examined) - 1
    if others:
        text += f"; {others:,} more differ" if others > 1 else "; one more differs"
        text += f", in {different:,} parameters in all" * (different > 1)
    if not ranks:
        text += "; which rank is right cannot be told"
    return text


def _values_text(element: Element, wrong: Sequence[int]) -> str:
    """ "1.7e+38 on rank 1 and 0.021 on ranks 0, 2": what few or the wrong ranks have first, with digits enough."""
    alike: dict[bytes, list[int]] = {}
    for rank, pattern in enumerate(element.patterns):
        alike.setdefault(pattern, []).append(rank)
    holders = sorted(alike.values(), key=lambda ranks: (len(ranks), ranks[0] not in wrong))
    digits = next((n for n in (3, 9, 17) if _are_told_apart(element, n)), 17)
    texts = [
        f"{_value_text(element.values[ranks[0]], digits)} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        for ranks in holders
    ]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _are_told_apart(element: Element, digits: int) -> bool:
    shown = {_value_text(value, digits) for value in element.values}
    return len(shown) == len(set(element.patterns))


def _value_text(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float | complex) else str(value)


def _differ_in_one_bit(element: Element) -> bool:
    patterns = sorted(set(element.patterns))
    if len(patterns) != 2:
        return False
    one, other = (int.from_bytes(each, "little") for each in patterns)
    return (one ^ other).bit_count() == 1
