"""The manifest: what a checkpoint consists of. Written last, so that where it is everything is; read with distrust."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from ddp.checkpoint.names import Metric, part_names

VERSION = 3  # of the files, and of what a trainer keeps in them: 1 knew no course, 2 was pickled by torch
LARGEST_MANIFEST_BYTES = 16 << 20
_LARGEST_NUMBER = (1 << 63) - 1
_LARGEST_WORLD = 1 << 20
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint, as it was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of; `files` by name, `metric` where one was taken at that very step."""

    version: int
    step: int
    world_size: int
    files: Mapping[str, FileEntry]
    metric: Metric | None = None

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


class OtherVersionError(ValueError):
    """A manifest of a program before or after this one."""


def to_json(manifest: Manifest) -> str:
    table = asdict(manifest)
    if manifest.metric is not None and not math.isfinite(manifest.metric.value):
        table["metric"]["value"] = str(manifest.metric.value)
    return json.dumps(table, indent=1, allow_nan=False)


def entry_to_json(entry: FileEntry) -> str:
    return json.dumps(asdict(entry))


def parse_manifest(text: bytes) -> Manifest:
    """Take it apart; every type and every range is checked.

    Raises:
        OtherVersionError: with a message that says what to do.
        ValueError: it is no manifest; the message says why.
    """
    table = _table(_loads(text), "it")
    version = _number(table, "version", _LARGEST_NUMBER)
    if version != VERSION:
        raise OtherVersionError(
            f"format version {version}, this program reads version {VERSION}; start a new run, or go "
            "on with the ddp that wrote it"
        )
    if unknown := table.keys() - {"version", "step", "world_size", "files", "metric"}:
        raise ValueError(f"has an unknown key {min(unknown)!r:.100}")
    files = _table(table.get("files"), "files")
    if unsafe := [name for name in files if "/" in name or name in ("", ".", "..")]:
        raise ValueError(f"names a file outside the checkpoint: {unsafe[0]!r:.100}")
    world_size = _number(table, "world_size", _LARGEST_WORLD)
    if len(files) != world_size + 1 or set(files) != set(part_names(world_size)):
        raise ValueError(f"does not name the files of {world_size} rank(s)")
    return Manifest(
        version=version,
        step=_number(table, "step", _LARGEST_NUMBER),
        world_size=world_size,
        files={name: _entry(entry) for name, entry in files.items()},
        metric=_metric(table.get("metric")),
    )


def parse_entry(text: bytes) -> FileEntry:
    """A file's size and hash as its writer noted them; ValueError where it is no such note."""
    return _entry(_loads(text))


def _entry(value: Any) -> FileEntry:
    table = _table(value, "a file's entry")
    digest = table.get("sha256")
    if table.keys() != {"size_bytes", "sha256"} or not isinstance(digest, str):
        raise ValueError("has a file without size and SHA-256")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("has a SHA-256 that is none")
    return FileEntry(_number(table, "size_bytes", _LARGEST_NUMBER), digest)


def _metric(value: Any) -> Metric | None:
    if value is None:
        return None
    table = _table(value, "metric")
    name, number, goal = table.get("name"), table.get("value"), table.get("goal")
    if table.keys() != {"name", "value", "goal"} or not isinstance(name, str) or goal not in ("max", "min"):
        raise ValueError("has a metric without name, value and goal")
    if isinstance(number, str) and number in _NOT_FINITE:
        return Metric(name, _NOT_FINITE[number], goal)
    if type(number) is not float and not (type(number) is int and abs(number) <= _LARGEST_NUMBER):
        raise ValueError("has a metric whose value is no number")
    return Metric(name, float(number), goal)


def _loads(text: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _table(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{what} is no table")
    return value


def _number(table: Mapping[str, Any], key: str, largest: int) -> int:
    value = table.get(key)
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{key} is no number from 0 to {largest}")
    return value
