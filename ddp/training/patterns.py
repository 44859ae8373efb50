"""Names of parameters and modules by patterns: "*" stands for any part of a name, dots too, so "features.*" is all below features."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ddp.errors import UsageError

MOST_SHOWN = 6


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of them stands for the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(patterns: Iterable[str], names: Sequence[str], field: str) -> None:
    """Refuse a pattern that stands for none of the names.

    Args:
        field: of the job file, for the message.

    Raises:
        UsageError: it names the pattern, what is close to it, and what there is.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            below = dict.fromkeys(f"{name[: end + 1]}*" for name in names for end in _dots(name))
            close = difflib.get_close_matches(pattern, [*below, *names], n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"{field}: {pattern!r} names nothing of the model{hint}; it has {shown(names)}")


def shown(names: Sequence[str]) -> str:
    """A few of them, and how many more."""
    rest = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + rest


def _dots(name: str) -> list[int]:
    return [place for place, character in enumerate(name) if character == "."]
