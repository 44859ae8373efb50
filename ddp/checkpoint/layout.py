"""The safetensors layout: eight bytes of length, a JSON header, then the tensors' bytes without a gap.

Written here and not by the library, which wants the whole file in memory at once, and torch. Whoever reads a header
trusts nothing in it: https://github.com/huggingface/safetensors#format says what must hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000  # the library's own limit
_DTYPES = {
    8: ("F64", "I64", "U64", "C64"),
    4: ("F32", "I32", "U32"),
    2: ("F16", "BF16", "I16", "U16"),
    1: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"),
}
ITEM_BYTES = {name: size_bytes for size_bytes, names in _DTYPES.items() for name in names}
_TREE = "ddp_tree"
_LONGEST_SHAPE = 64
_LARGEST_DIMENSION = 1 << 62


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor in the data of a file: bytes `start` to `stop`."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    start: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def stop(self) -> int:
        return self.start + self.size_bytes


def arrange(described: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[Place]:
    """Places for tensors of these dtypes and shapes: wide items first, so that each is aligned to its own width."""
    places: list[Place] = []
    stop = 0
    for name, (dtype, shape) in sorted(described.items(), key=lambda item: -ITEM_BYTES[item[1][0]]):
        places.append(Place(name, dtype, shape, stop))
        stop = places[-1].stop
    return places


def header(tree: Any, places: Sequence[Place], extra: Mapping[str, str] | None = None) -> bytes:
    """All that comes before the data. `tree` is JSON-able; `extra` are texts for people.

    Raises:
        ValueError: it would be larger than a reader takes.
    """
    metadata = {**(extra or {}), **({} if tree is None else {_TREE: json.dumps(tree, separators=(",", ":"))})}
    table: dict[str, Any] = {"__metadata__": metadata}
    for place in places:
        offsets = [place.start, place.stop]
        table[place.name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text = text.ljust(-(-len(text) // 8) * 8)
    if len(text) > LARGEST_HEADER_BYTES:
        raise ValueError(
            f"{len(text):,} bytes of plain values where {LARGEST_HEADER_BYTES:,} are the most: use tensors"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(first_bytes: bytes, file_bytes: int) -> int:
    """How long the header is, by the file's first bytes; ValueError where that cannot be."""
    length = int.from_bytes(first_bytes, "little")
    if len(first_bytes) != LENGTH_BYTES or not 2 <= length <= min(LARGEST_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ValueError("the length of its header is none")
    return length


def parse(text: bytes, data_bytes: int) -> tuple[Any, list[Place]]:
    """The tree and the places, in the order of the data; ValueError where anything about them cannot be."""
    metadata, places = parse_any(text, data_bytes)
    try:
        return json.loads(metadata[_TREE]), places
    except (TypeError, KeyError, RecursionError) as fault:
        raise ValueError(f"its header is not of this form: {fault!r:.200}") from None


def parse_any(text: bytes, data_bytes: int) -> tuple[dict[str, Any], list[Place]]:
    """The same of a file that anyone may have written: its texts, which may be none, and the places."""
    try:
        table = json.loads(text.decode("utf-8"))
        metadata = table.pop("__metadata__", {})
        places = [_place(name, entry) for name, entry in table.items()]
        if not isinstance(metadata, dict):
            raise TypeError(f"__metadata__ is {metadata!r:.200}")
    except (TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise ValueError(f"its header is not of this form: {fault!r:.200}") from None
    places.sort(key=lambda place: (place.start, place.stop))
    stop = 0
    for place in places:
        if place.start != stop:
            raise ValueError(f"tensors overlap or leave a gap at {place.name!r:.200}")
        stop = place.stop
    if stop != data_bytes:
        raise ValueError(f"its tensors are {stop} bytes, and the file has {data_bytes} for them")
    return metadata, places


def _place(name: str, entry: Mapping[str, Any]) -> Place:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or len(shape) > _LONGEST_SHAPE or entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r:.200} has a shape or a dtype that is none")
    if any(type(each) is not int or not 0 <= each <= _LARGEST_DIMENSION for each in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r:.200} has a size that is none")
    place = Place(name, entry["dtype"], tuple(shape), start)
    if place.stop != stop:
        raise ValueError(f"tensor {name!r:.200} does not fill its bytes")
    return place
