"""Common mistakes in attached scripts: each named once, with what to do; their neighbours are silent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

import ddp
from ddp.errors import UsageError
from ddp.metering.attach import GradientMeter
from ranks import RankPool, process_group

BATCH, STEPS = 6, 8


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    rows = torch.randn(BATCH, 5, generator=generator)
    return (model(rows[:, :4])[:, 0] - rows[:, 4]).square().mean()


Step = Callable[[DistributedDataParallel, Optimizer, GradientMeter, torch.Generator], None]


def _two_averaged_backwards(
    model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
) -> None:
    optimizer.zero_grad()
    for _ in range(2):
        (_loss(model, generator) / 2).backward()
    optimizer.step()
    meter.step()


def _never_zeroed(
    model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
) -> None:
    _loss(model, generator).backward()
    optimizer.step()
    meter.step()


def _zeroed_in_place_after_forward(
    model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
) -> None:
    loss = _loss(model, generator)
    torch.autograd.grad(_loss(model.module, generator), list(model.parameters()))  # no backward of the step
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    meter.step(BATCH)


def _accumulating(examples: int | None) -> Step:
    def step(
        model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
    ) -> None:
        optimizer.zero_grad()
        for index in range(3):
            with nullcontext() if index == 2 else model.no_sync():
                (_loss(model, generator) / 3).backward()
        optimizer.step()
        meter.step(examples)

    return step


def _clipping(
    model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
) -> None:
    optimizer.zero_grad()
    _loss(model, generator).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    meter.step()


def _thrown_away(examples: int | None) -> Step:
    def step(
        model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
    ) -> None:
        optimizer.zero_grad()
        _loss(model, generator)  # looked at, say for an accuracy
        _loss(model, generator).backward()
        optimizer.step()
        meter.step(examples)

    return step


def _scaled(*, clip: bool, told: bool = False, scale: float = 2.0**8, norm: float = 100.0) -> Step:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def step(
        model: DistributedDataParallel, optimizer: Optimizer, meter: GradientMeter, generator: torch.Generator
    ) -> None:
        optimizer.zero_grad()
        scaler.scale(_loss(model, generator)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        scaler.step(optimizer)
        scaler.update()
        meter.step()

    step.scaler = scaler if told else None  # type: ignore[attr-defined]
    return step


STEPS_OF: dict[str, Callable[[], Step]] = {
    "no_sync forgotten": lambda: _two_averaged_backwards,
    "never zeroed": lambda: _never_zeroed,
    "zeroed in place": lambda: _zeroed_in_place_after_forward,
    "examples of one": lambda: _accumulating(BATCH),
    "examples of all": lambda: _accumulating(3 * BATCH),
    "examples not told": lambda: _accumulating(None),
    "clipped": lambda: _clipping,
    "scaled": lambda: _scaled(clip=False),
    "scaled and clipped": lambda: _scaled(clip=True),
    "scaled and clipped in each": lambda: _scaled(clip=True, scale=2.0**16, norm=0.1),
    "thrown away": lambda: _thrown_away(None),
    "thrown away and told": lambda: _thrown_away(BATCH),
    "scaler told": lambda: _scaled(clip=False, told=True),
    "scaled, fused": lambda: _scaled(clip=False),
    "batch norm": lambda: _clipping,
}


def _run(rank: int, world_size: int, store_address: str, how: str) -> tuple[list[str], int, str]:
    handler = Lines()
    logging.getLogger("ddp.metering").addHandler(handler)
    try:
        with process_group(rank, world_size, store_address):
            torch.manual_seed(0)
            inner = nn.Sequential(
                nn.Linear(4, 3), nn.BatchNorm1d(3) if how == "batch norm" else nn.Tanh(), nn.Linear(3, 1)
            )
            model = DistributedDataParallel(inner)
            make, step = (Adam if how == "scaled, fused" else SGD), STEPS_OF[how]()
            optimizer = make(model.parameters(), lr=1e-3, fused=how == "scaled, fused")
            meter = ddp.attach(
                model, BATCH, "shared_memory", optimizer=optimizer, grad_scaler=getattr(step, "scaler", None)
            )
            generator = torch.Generator().manual_seed(rank)
            for _ in range(STEPS):
                step(model, optimizer, meter, generator)
            readings = meter.readings
            meter.close()
    finally:
        logging.getLogger("ddp.metering").removeHandler(handler)
    return handler.lines, readings.plain.observations, readings.method


@pytest.mark.parametrize(
    "how, words, observations",
    [
        ("no_sync forgotten", "under model.no_sync(), forward included", STEPS),  # of each step's first backward
        ("never zeroed", "optimizer.zero_grad() in every step", 1),
        ("zeroed in place", "", STEPS - 1),
        ("examples of one", f"examples={BATCH}) is one backward's batch, and 3 were accumulated", STEPS - 1),
        ("examples of all", "", STEPS - 1),
        ("examples not told", "", STEPS - 1),
        ("clipped", "", STEPS - 1),
        ("scaled", "divided by 256 between backward and the optimizer's step", STEPS - 1),
        ("scaled and clipped", "divided by 256", STEPS - 1),
        ("scaled and clipped in each", "is that a torch.amp.GradScaler beside clipping?", STEPS - 1),
        ("thrown away", "called 2 times with gradients for 1 backward, and", STEPS - 1),
        ("thrown away and told", "", STEPS - 1),
        ("scaler told", "", STEPS - 1),
        ("scaled, fused", "divided by 256", STEPS - 1),
        ("batch norm", "normalises over its batch", STEPS - 1),
    ],
)
def test_a_mistake_is_named_once(rank_pool: RankPool, how: str, words: str, observations: int) -> None:
    (lines, first, method), (others, second, _) = rank_pool.run(2, _run, how)
    assert others == [] and first == second
    assert len(lines) == bool(words), lines
    assert all(words in line for line in lines)
    assert first == observations
    if how.startswith("examples"):
        assert method == "micro_batches"


def _alone(rank: int, world_size: int, store_address: str, backwards: int) -> list[str]:
    handler = Lines()
    logging.getLogger("ddp.metering").addHandler(handler)
    try:
        with process_group(rank, world_size, store_address):
            model = DistributedDataParallel(nn.Linear(4, 1))
            optimizer = SGD(model.parameters(), lr=1e-3)
            meter = ddp.attach(model, BATCH)
            step = _accumulating(None) if backwards == 3 else _clipping
            for _ in range(STEPS):
                step(model, optimizer, meter, torch.Generator().manual_seed(rank))
            meter.close()
    finally:
        logging.getLogger("ddp.metering").removeHandler(handler)
    return handler.lines


def test_one_rank_says_once_that_it_needs_accumulation(rank_pool: RankPool) -> None:
    ((line,),) = rank_pool.run(1, _alone, 1)
    assert "accumulate several backwards a step" in line
    assert rank_pool.run(1, _alone, 3) == [[]]


def _refused(rank: int, world_size: int, store_address: str) -> list[str]:
    with process_group(rank, world_size, store_address):
        model = DistributedDataParallel(nn.Linear(4, 1))
        messages = []
        meter = ddp.attach(DistributedDataParallel(nn.Linear(4, 1)), BATCH)
        attempts: list[Callable[[], object]] = [
            lambda: ddp.attach(model, BATCH, population=BATCH - 1),
            lambda: ddp.attach(model, BATCH, sample_every=0),
            lambda: meter.step(weight=-1.0),
            lambda: meter.step(weight=float("nan")),
            lambda: meter.step(examples=-2),
        ]
        for attempt in attempts:
            with pytest.raises(UsageError) as caught:
                attempt()
            messages.append(str(caught.value))
        meter.close()
    return messages


def test_numbers_that_cannot_be(rank_pool: RankPool) -> None:
    ((population, every, negative, nan, examples),) = rank_pool.run(1, _refused)
    assert "population=5" in population and "sample_every=0" in every
    assert "weight=-1.0" in negative and "weight=nan" in nan and "examples=-2" in examples
