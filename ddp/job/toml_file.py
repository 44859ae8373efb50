"""TOML from a file or a command line, as bounded plain data: whatever the text is, a table or one clear error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, cast

from ddp.errors import JobFileError
from ddp.job.plain_file import read_plain_file

MOST_BYTES = 1 << 20
DEEPEST = 20  # tables and lists within each other


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in the file.

    Args:
        what: "the job file", for messages.

    Raises:
        JobFileError: it cannot be read, is too large, no UTF-8 text, no TOML, or nested too deeply.
    """
    try:
        content = read_plain_file(path, MOST_BYTES, pipes=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        raise JobFileError(f"{path}: cannot read {what}: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise JobFileError(f"{path}: {what} is not UTF-8 text (byte {error.start})") from None
    try:
        table = tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise JobFileError(f"{path}: {_too_deep(what)}") from None
    except ValueError as error:  # TOMLDecodeError, or a number that Python does not read
        raise JobFileError(f"{path}: not valid TOML: {error}") from None
    if is_too_deep(table):
        raise JobFileError(f"{path}: {_too_deep(what)}")
    return table


def toml_value(text: str) -> Any:
    """The value that `text` is in TOML, else `text` itself: a word needs no quotes on a command line."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (RecursionError, ValueError):
        return text
    return table["value"] if len(table) == 1 else text


def is_too_deep(value: object) -> bool:
    """Whether tables and lists are nested deeper than `DEEPEST`; looks without recursion."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            return True
        level = [inner for each in level for inner in _inside(each)]
        depth += 1
    return False


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast(dict[str, object], value).values())
    return cast(list[object], value) if isinstance(value, list) else []


def _too_deep(what: str) -> str:
    return f"{what} has tables or lists more than {DEEPEST} deep in each other"
