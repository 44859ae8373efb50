"""How the kernels are compiled by Numba, and where they are kept.

Explicit signatures, ahead of use, so that no compilation falls inside a deadline; without the GIL; cached in a folder
named by the kernels' sources; of ranks that start together on a node one compiles.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from numba import extending

_SOURCE = Path(__file__).resolve().parent


def _cache_directory() -> Path | None:
    """Where compiled kernels are kept; None: nowhere.

    Numba compares a cached kernel with the file that defines it, not with those it imports from; so the directory is
    named by what all of them hold.
    """
    sources = (path.read_bytes() for path in sorted(_SOURCE.glob("*.py")))
    marks = (b"ddp.transport.jit", b"ddp.transport.compiling", b"ROW_LENGTH")  # kernels keep the length of a row too
    digest = hashlib.sha256(b"".join(source for source in sources if any(mark in source for mark in marks))).hexdigest()
    own = Path(tempfile.gettempdir()) / f"ddp-numba-{os.getuid()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddp"
    given = os.environ.get("NUMBA_CACHE_DIR")
    for base in (Path(given),) if given else (_SOURCE / "__pycache__", cache, own):
        directory = base / f"kernels-{digest[:12]}"
        if base.parent == _SOURCE:
            _remove_older(base, directory.name)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK):
            return directory
    return None


def _remove_older(base: Path, name: str) -> None:
    for directory in base.glob("kernels-*"):
        if directory.name != name:
            shutil.rmtree(directory, ignore_errors=True)


_CACHE = _cache_directory()


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile now for `signature`, without the GIL, cached on disk where possible."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = on_demand(signature)(function)
        dispatcher.prepare()
        return dispatcher

    return decorate


def on_demand(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: as `compiled`, but compiled by its method `prepare`, or at the first call."""

    def decorate(function: Callable[..., Any]) -> Any:
        with _cached_in(_CACHE):
            cached = _CACHE is not None
            dispatcher: Any = numba.njit(nogil=True, cache=cached, error_model="numpy", boundscheck=False)(function)

        def prepare() -> None:
            if not dispatcher.signatures:
                with _one_at_a_time():
                    dispatcher.compile(signature)
                dispatcher.disable_compile()

        dispatcher.prepare = prepare
        return dispatcher

    return decorate


@contextmanager
def _cached_in(directory: Path | None) -> Iterator[None]:
    """Functions decorated meanwhile are cached there; others of this process where Numba's configuration says."""
    configuration: Any = numba.config
    before, configuration.CACHE_DIR = configuration.CACHE_DIR, str(directory or "")
    try:
        yield
    finally:
        configuration.CACHE_DIR = before


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among the processes of a node: of ranks that start together one compiles, and the others find it in the cache."""
    if _CACHE is None:
        yield
        return
    descriptor = os.open(_CACHE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # a file system without locks: then each compiles for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def intrinsic(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: machine code by hand; kernels call it without the typing context that the definition starts with."""
    return extending.intrinsic(definition)


def chosen_by_type(stub: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function is given the types of the arguments, and answers with what `stub` means for them."""
    options: Any = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    return extending.overload(stub, jit_options=options)


def inlined(function: Callable[..., Any]) -> Any:
    """Decorator for parts of a kernel: compiled with, and for the types of, the kernel that calls it."""
    return numba.njit(function, nogil=True, error_model="numpy", boundscheck=False, inline="never")
