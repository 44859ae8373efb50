"""Secrets: a job names where one is, its value is read when the task is built, and what we print shows `***`.

A text in a task's options may be `{ env = "NAME" }` or `{ file = "/path" }`. The job, its job.toml and all that is made
from them hold that and no more. A text under a key that looks like a secret's, or a URL with a password in it, is refused.
"""

from __future__ import annotations

import html
import json
import logging
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from ddp.errors import UsageError
from ddp.job.private_file import read_private_file

HIDDEN = "***"
SHORTEST = 4  # characters: a shorter value cannot be told from other text, nor hidden in it
SECRET_KEY = re.compile(
    r"(?:^|_)(?:token|password|passwd|pass|passphrase|pwd|secret|credential|authorization|bearer"
    r"|apikey|(?:api|access|private|secret|account|encryption|signing|auth)_key)(?P<plural>s?)$"
)
TOKENS_OF_TEXT = frozenset(
    f"{kind}_token" for kind in ("bos", "cls", "end", "eos", "mask", "pad", "sep", "special", "start", "stop", "unk")
)  # what a language model calls a token is no secret
PASSWORD_IN_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s:@]*:[^/\s@]+@")

_known: set[str] = set()  # every way in which a value that this process has read may be written


def is_reference(value: object) -> bool:
    """Whether it stands for a secret: a table with one key, `env` or `file`, that names one."""
    if not isinstance(value, Mapping) or len(cast(Mapping[object, object], value)) != 1:
        return False
    ((kind, name),) = cast(Mapping[object, object], value).items()
    return kind in ("env", "file") and isinstance(name, str)


def literal_secrets(options: Mapping[str, Any], where: str) -> list[str]:
    """One line, without the value, for each secret that stands in `options` itself."""
    return [
        f'{path}: a secret does not belong into a job file: write {{ env = "NAME" }} or {{ file = "/path" }} instead'
        for path, key, value in _leaves(options, where)
        if _is_secret(key, value)
    ]


def resolve_secrets(options: Mapping[str, Any], environ: Mapping[str, str], where: str) -> dict[str, Any]:
    """`options` with each reference replaced by its value, which `redact` hides from now on.

    Raises:
        UsageError: a variable is not set, or a file cannot be read or is not private.
    """
    return {key: _resolved(value, environ, f"{where}.{key}") for key, value in options.items()}


def redact(text: str) -> str:
    """`text` with `***` for every secret that this process has read."""
    for form in sorted(_known, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


def hide(value: str) -> None:
    """`redact` hides it from now on, where it is long enough to be told from other text."""
    if len(value) >= SHORTEST:
        _remembered(value, "")


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _leaves(value: object, path: str, key: str = "") -> Iterator[tuple[str, str, object]]:
    """Every value that is no table and no list, with its path and its key: of several above it one that hides a secret."""
    if is_reference(value):
        return
    if isinstance(value, Mapping):
        for name, each in cast(Mapping[str, object], value).items():
            yield from _leaves(each, f"{path}.{name}", key if SECRET_KEY.search(_plain(key)) else name)
    elif isinstance(value, list):
        for each in cast(Sequence[object], value):
            yield from _leaves(each, path, key)
    else:
        yield path, key, value


def _is_secret(key: str, value: object) -> bool:
    if isinstance(value, str) and PASSWORD_IN_URL.search(value):
        return True
    match = SECRET_KEY.search(_plain(key))
    if match is None or _plain(key).removesuffix("s") in TOKENS_OF_TEXT:
        return False
    counts = match["plural"] and not isinstance(value, str)  # tokens = 128: how many
    return value != "" and not isinstance(value, bool) and not counts


def _plain(key: str) -> str:
    """Words in small letters with underscores between them."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(".", "_")


def _resolved(value: Any, environ: Mapping[str, str], where: str) -> Any:
    if is_reference(value):
        ((kind, name),) = cast(Mapping[str, str], value).items()
        return _remembered(_variable(name, environ, where) if kind == "env" else _file(name, where), where)
    if isinstance(value, Mapping):
        return resolve_secrets(cast(Mapping[str, Any], value), environ, where)
    if isinstance(value, list):
        return [_resolved(each, environ, where) for each in cast(Sequence[Any], value)]
    return value


def _variable(name: str, environ: Mapping[str, str], where: str) -> str:
    if name not in environ:
        raise UsageError(f"{where}: the environment variable {name} is not set: set it for all ranks")
    return environ[name]


def _file(path: str, where: str) -> str:
    try:
        return read_private_file(path, where).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UsageError(f"{where}: {path} is not UTF-8 text") from None


def _remembered(value: str, where: str) -> str:
    if len(value) < SHORTEST:
        raise UsageError(f"{where}: the secret has fewer than {SHORTEST} characters: is it the right one?")
    lines = [line.strip() for line in value.splitlines()]
    for each in (value, *(line for line in lines if len(line) >= 8)):
        quoted = urllib.parse.quote(each, safe="", errors="surrogateescape")
        _known.update({each, repr(each)[1:-1], json.dumps(each)[1:-1], quoted, html.escape(each)})
    return value
