"""Standard streams that whoever started us closed. Loads no torch."""

from __future__ import annotations

import os
import sys


def open_missing_streams() -> None:
    """Started with one of them closed, the next file that is opened would be taken for it, and written into."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
