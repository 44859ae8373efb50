"""Nests of plain values and tensors as JSON and back, exactly: types, order, bits of floats.

JSON's own types stand for themselves; an object of one key, its tag, for the rest:

    {"dict": [[key, value], ...]}   {"ordered": [[key, value], ...]}   {"tuple": [...]}
    {"int": "hex"}                  beyond 64 bits
    {"float": "hex"}                the eight bytes of one that is not finite
    {"complex": "hex"}              the sixteen bytes
    {"bytes": "hex"}
    {"tensor": "name"}              which the file holds beside the tree
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ddp.errors import CheckpointError

_LARGEST_NUMBER = 1 << 63  # what any reader of JSON gets right
_FIRST_NAMES = frozenset({"__metadata__"})  # has a meaning of its own in safetensors


def flatten(value: Any, where: str, is_tensor: Callable[[Any], bool]) -> tuple[Any, dict[str, Any]]:
    """A JSON-able copy of `value`, and its tensors by the names that it has them by.

    Raises:
        CheckpointError: something in it is neither plain nor a tensor; the message begins with `where`.
    """
    tensors: dict[str, Any] = {}

    def pairs(table: Mapping[Any, Any], at: str, path: str) -> list[list[Any]]:
        return [
            [visit(key, f"{at}: a key", path), visit(item, f"{at}: {key}", _below(path, key))]
            for key, item in table.items()
        ]

    def visit(item: Any, at: str, path: str) -> Any:
        kind = type(item)
        if item is None or kind is bool or kind is str:
            return item
        if kind is int:
            return item if -_LARGEST_NUMBER <= item < _LARGEST_NUMBER else {"int": hex(item)}
        if kind is float:
            return item if math.isfinite(item) else {"float": struct.pack(">d", item).hex()}
        if kind is complex:
            return {"complex": struct.pack(">dd", item.real, item.imag).hex()}
        if kind is bytes:
            return {"bytes": item.hex()}
        if kind is list:
            return [visit(each, f"{at}[{index}]", _below(path, index)) for index, each in enumerate(item)]
        if kind is tuple:
            return {"tuple": [visit(each, f"{at}[{index}]", _below(path, index)) for index, each in enumerate(item)]}
        if kind is dict:
            return {"dict": pairs(item, at, path)}
        if kind is OrderedDict:
            return {"ordered": pairs(item, at, path)}
        if not is_tensor(item):
            full = f"{kind.__module__}.{kind.__qualname__}"
            raise CheckpointError(f"{at}: a checkpoint holds tensors and plain values, not a {full}")
        name = _free_name(path, tensors)
        tensors[name] = item
        return {"tensor": name}

    try:
        return visit(value, where, ""), tensors
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply to be saved, or holds itself") from None


def unflatten(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """What `flatten` was given, with `tensors` in its places.

    Raises:
        ValueError: `tree` is not of this form, or names a tensor that is not there.
    """
    try:
        return _visit(tree, tensors)
    except (RecursionError, TypeError, KeyError, struct.error) as fault:
        raise ValueError(f"not a tree of plain values: {fault!r}") from None


def _visit(item: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(item, list):
        return [_visit(each, tensors) for each in item]
    if not isinstance(item, dict):
        return item
    ((tag, content),) = item.items()
    if tag in ("dict", "ordered"):
        made = ((_visit(key, tensors), _visit(each, tensors)) for key, each in content)
        return dict(made) if tag == "dict" else OrderedDict(made)
    if tag == "tuple":
        return tuple(_visit(each, tensors) for each in content)
    if tag == "tensor":
        return tensors[content]
    if tag == "int":
        return int(content, 16)
    if tag == "complex":
        return complex(*struct.unpack(">dd", bytes.fromhex(content)))
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    raise ValueError(f"not a tree of plain values: an unknown tag {tag!r:.40}")


def _below(path: str, key: Any) -> str:
    """A name for people; it need be no more than that, as `_free_name` keeps names apart."""
    text = str(key)[:200].encode("utf-8", "backslashreplace").decode()
    return f"{path}.{text}" if path else text


def _free_name(path: str, taken: Mapping[str, Any]) -> str:
    name, count = path or "value", 1
    while name in taken or name in _FIRST_NAMES:
        count += 1
        name = f"{path}#{count}"
    return name
