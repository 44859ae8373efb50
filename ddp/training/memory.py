"""Memory that training frees and takes again in every step.

A backward allocates each gradient anew. Left alone, glibc gives large blocks back to the kernel when they are freed, and
the kernel hands them out again page by page, zeroed: a model of 25 M parameters meets some 18,000 page faults a step, a
fifth of its time at small batches. Told to keep what is freed, it meets none; the process stays as large as it
was at its largest.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

# Parameters of mallopt(3) in glibc, and their values; the threshold for mmap cannot be more than 32 MiB.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _LARGEST_THRESHOLD = 2**31 - 1, 32 << 20
_INITIAL_THRESHOLD = 128 << 10  # of both
_CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(keep: bool = True) -> bool:
    """Whether glibc now keeps freed blocks of up to 32 MiB; it is left alone where the environment tunes it.

    Args:
        keep: False brings back the thresholds that a process begins with.
    """
    library = _glibc()
    if library is None or any(name in os.environ for name in _CHOSEN_BY_USER):
        return False
    trimming, mapping = (_NEVER_TRIM, _LARGEST_THRESHOLD) if keep else (_INITIAL_THRESHOLD, _INITIAL_THRESHOLD)
    taken = library.mallopt(_TRIM_THRESHOLD, trimming) and library.mallopt(_MMAP_THRESHOLD, mapping)
    return bool(taken) and keep


@cache
def _glibc() -> ctypes.CDLL | None:
    """None on another C library."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
