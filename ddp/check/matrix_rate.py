"""How fast a step multiplies matrices, as a share of what this rank's BLAS does with large ones at the same time.

Floating-point operations of the forward and the backward are counted by torch (matrix products, convolutions and
attention); all other time of a step, small operations included, lowers the share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddp.check.determinism import without_dropout
from ddp.check.subject import Subject
from ddp.check.verdicts import Verdict
from ddp.training.random_state import preserved_random_state

RATE = "matrix products"
SIDE = 1024  # of the square matrices that stand for the BLAS rate
LEAST_OPERATIONS = 1e7  # of a step: with fewer, calls cost more than what they compute
SANE = 0.05  # of the BLAS rate
LEAST_RATE = 1e9  # of the BLAS itself, operations a second and thread: any machine of this century does more
REPEATS, SECONDS = 5, 2.0  # at least so many of one thing, unless they take longer together


def check_matrix_rate(subject: Subject) -> Verdict:
    """Forward and backward of one micro-batch against square products of float32; all ranks measure at once."""
    model = without_dropout(subject.initial)
    count = subject.job.batch.examples_at_once(subject.world_size)
    batch = subject.fetch(subject.examples(count))

    def train() -> None:
        model.zero_grad()
        subject.plain_task.loss(model, batch).mean().backward()

    with preserved_random_state():
        with FlopCounterMode(display=False) as counter:
            train()
        operations = counter.get_total_flops()
        blas = 2 * SIDE**3 / _seconds(_square_product(subject.device), subject.device)
        rate = operations / _seconds(train, subject.device)
    return rate_verdict(operations, rate, blas, threads=torch.get_num_threads(), examples=count)


def rate_verdict(operations: float, rate: float, blas: float, *, threads: int, examples: int) -> Verdict:
    """`rate` and `blas` in operations a second; `operations` of a step of so many examples."""
    figures = {"operations": operations, "rate": rate, "blas": blas, "threads": threads, "examples": examples}
    machine = f"{SIDE} x {SIDE} products run at {blas / 1e9:.3g} Gflop/s on {threads} thread{'s' * (threads > 1)}"
    if blas < LEAST_RATE * threads:
        advice = "the machine is busy, throttled, or torch has no fast BLAS: look at the load, and at torch.__config__.show()"
        return Verdict(RATE, "warning", machine, advice, figures)
    if operations < LEAST_OPERATIONS:
        found = f"a micro-batch of {examples} has {operations:.2g} operations in products: too few to judge; {machine}"
        return Verdict(RATE, "skipped", found, "", figures)
    found = (
        f"a micro-batch of {examples} runs at {rate / 1e9:.3g} Gflop/s, {rate / blas:.1%} of the BLAS rate; {machine}"
    )
    if rate < SANE * blas:
        return Verdict(RATE, "warning", found, _ADVICE, figures)
    return Verdict(RATE, "ok", found, "", figures)


_ADVICE = (
    "most of a step is not spent in products: larger micro-batches, wider layers, fewer and larger operations, or other "
    "threads (run.threads_per_rank)"
)


def _square_product(device: torch.device) -> Callable[[], None]:
    left, right = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)

    return multiply


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    """The median of some repeats, after one that warms up."""
    _timed(action, device)
    began, times = time.perf_counter(), []
    while not times or (len(times) < REPEATS and time.perf_counter() - began < SECONDS):
        times.append(_timed(action, device))
    return max(statistics.median(times), 1e-9)


def _timed(action: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
