"""What the interpreter itself writes on standard error, without secrets: errors that nobody caught, and warnings.

An error that ends a thread of a task's, one in a finalizer, and a warning show values as tracebacks do.
"""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from ddp.job.secrets import redact


def hide_secrets_in_hooks() -> None:
    """From now on in this process, and in those that are forked from it."""
    sys.excepthook = _uncaught
    threading.excepthook = _ended_thread
    sys.unraisablehook = _unraisable
    warnings.showwarning = _warn


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    _write(_in_words(kind, error, trace))


def _ended_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_type is not SystemExit:
        name = told.thread.name if told.thread is not None else threading.get_ident()
        _write(f"Exception in thread {name}:\n{_in_words(told.exc_type, told.exc_value, told.exc_traceback)}")


def _unraisable(told: sys.UnraisableHookArgs) -> None:
    try:
        where = repr(told.object)
    except Exception:  # of whatever object it is
        where = f"<{type(told.object).__name__}>"
    trace = _in_words(told.exc_type, told.exc_value, told.exc_traceback)
    _write(f"{told.err_msg or 'Exception ignored in'}: {where}\n{trace}")


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _write(warnings.formatwarning(message, category, filename, lineno, line), file)


def _in_words(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> str:
    return "".join(traceback.format_exception(kind, error, trace))


def _write(text: str, file: TextIO | None = None) -> None:
    """In one piece: other threads write too. An error here would be shown as it is, with the first one."""
    with suppress(Exception):
        stream = file or sys.stderr
        stream.write(redact(text))
        stream.flush()
