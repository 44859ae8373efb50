"""Ranks that decide together, outside the training step: short texts over c10d, and errors shared by all.

An error that one rank alone finds (a port in use, a missing device) must end all of them with the same exit
code and one message, and none may be left waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ddp import errors
from ddp.errors import DdpError, StoppedError

T = TypeVar("T")


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in rank order. Collective."""
    mine = text.encode(errors="surrogatepass")  # a file's name need not be UTF-8
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    sizes = [int(length) for length in lengths]
    padded = torch.frombuffer(bytearray(mine.ljust(max(1, *sizes), b"\0")), dtype=torch.uint8)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    texts = (bytes(part[:size].tolist()) for part, size in zip(parts, sizes, strict=True))
    return [each.decode(errors="surrogatepass") for each in texts]


def from_rank_zero(text: str) -> str:
    """Rank 0's text, on all ranks. Collective."""
    return gather_texts(text if dist.get_rank() == 0 else "")[0]


def together(action: Callable[[], T]) -> T:
    """Run `action` on this rank; where any rank's raised a DdpError, raise the first of them on all. Collective."""
    result: T | None = None
    failure: DdpError | None = None
    try:
        result = action()
    except DdpError as error:
        failure = error
    reports = gather_texts(f"{type(failure).__name__}\n{failure}" if failure else "")
    first = next((rank for rank, report in enumerate(reports) if report), None)
    if first is None:
        return result  # type: ignore[return-value]  # no error: the action has returned
    if failure is not None and first == dist.get_rank():
        raise failure
    kind, _, message = reports[first].partition("\n")
    error: DdpError = getattr(errors, kind, DdpError)(message)
    error.consequence = True  # the rank that found it says it
    raise error


def stop_together(asked: bool, what: str) -> None:
    """End `what` on all ranks where any was asked to stop. Collective.

    Raises:
        StoppedError: on all of them.
    """
    flag = torch.tensor([float(asked)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if flag.item():
        raise StoppedError(f"{what}: stopped by a signal: run it again")
