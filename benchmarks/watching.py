"""What watching costs a training step: the digits network, and an MLP of 25 M float32 parameters with 16 and 128 examples.

    python benchmarks/watching.py [--ranks 2] [--pairs 120] [--json FILE]

Steps with watching on and off, in pairs, one of each in turn, timed by the slowest rank. Every fourth step of the first kind
is looked at; the ratio weighs those with the interval K that "auto" takes for what a look costs, in the middle of a long run,
and its interval comes from a bootstrap over pairs. "other steps" are those that are not looked at: they should cost nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp.job import DigitsSection, WatchingSection
from ddp.tasks.networks import convolutional_network
from ddp.telemetry.records import LayersRecord, Sink
from ddp.telemetry.sinks import Sinks
from ddp.training.memory import keep_freed_memory
from ddp.training.watching import LayerWatch
from ddp.transport.comm_hook import GradientExchange, comm_hook, register
from ddp.transport.select import select_transport
from ddp.watching.cadence import Cadence
from harness import Figures, machine, run, slowest_of_ranks, table
from train_step import INPUTS, OUTPUTS, network

EVERY = 4
LONG_RUN = 400  # steps: so early "auto" is bounded by cost alone


class Costs(Sink):
    """A sink that keeps what looks cost, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def layers(self, record: LayersRecord) -> None:
        self.seconds.append(record.cost_seconds)


class Step:
    """The trainer's step; `watched` says whether every fourth is looked at."""

    def __init__(self, make: Callable[[], nn.Module], inputs: Tensor, classes: int, *, watched: bool) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(make(), gradient_as_bucket_view=True)
        self.exchange = GradientExchange(select_transport("shared_memory", "cpu", 120.0))
        register(self.model, self.exchange, comm_hook)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.inputs, self.targets = inputs, torch.randint(classes, (len(inputs),))
        self.costs, self.number = Costs(), 0
        self.sinks = Sinks([self.costs])
        where = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "device": torch.device("cpu")}
        self.watch = LayerWatch(WatchingSection(every=EVERY), self.model, **where) if watched else None

    def __call__(self) -> None:
        self.number += 1
        watch = self.watch if self.watch is not None and self.watch.wants(self.number) else None
        if watch is not None:
            watch.before_forward(self.number)
        nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.exchange.take()
        if watch is not None:
            watch.before_update(self.number)
        self.optimizer.step()
        if watch is not None:
            watch.after_update(self.number, self.sinks)
        self.optimizer.zero_grad()


def overhead(make: Callable[[], nn.Module], inputs: Tensor, classes: int, pairs: int) -> dict[str, float]:
    """Seconds of steps with watching on over those without, and what makes it up. Collective."""
    off, on = (Step(make, inputs, classes, watched=watched) for watched in (False, True))
    for _ in range(2 * EVERY):
        on()
        off()
    ratios: dict[bool, list[float]] = {False: [], True: []}
    plain: list[float] = []
    for pair in range(pairs):
        seconds = {step: _timed(step) for step in ((off, on) if pair % 2 else (on, off))}
        ratios[on.number % EVERY == 0].append(seconds[on] / seconds[off])
        plain.append(seconds[off])
    step_seconds = statistics.median(plain)
    every = _interval(statistics.median(on.costs.seconds or [0.0]), step_seconds)
    return {"step": step_seconds, "every": every, **_weighed(ratios, every)}


def _timed(step: Step) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    step()
    return slowest_of_ranks({"step": time.perf_counter() - began})["step"]


def _interval(cost_seconds: float, step_seconds: float) -> int:
    """K of "auto" where looks cost so much: rank 0's, which alone is shown."""
    cadence = Cadence("auto")
    for step in range(1, 6):
        cadence.looked(step, cost_seconds, step_seconds)
    return cadence.interval(LONG_RUN)


def _weighed(ratios: Mapping[bool, Sequence[float]], every: int) -> dict[str, float]:
    draw = np.random.default_rng(0)

    def ratio(of: Mapping[bool, Sequence[float]]) -> float:
        return statistics.median(of[False]) * (1 - 1 / every) + statistics.median(of[True]) / every

    resampled = [
        ratio({kind: draw.choice(each, len(each)).tolist() for kind, each in ratios.items()}) for _ in range(2000)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975)).tolist()
    look, other = statistics.median(ratios[True]), statistics.median(ratios[False])
    return {"ratio": ratio(ratios), "low": low, "high": high, "look": look, "other": other}


def measure(arguments: argparse.Namespace) -> Figures:
    """Collective over all ranks."""
    keep_freed_memory()
    torch.manual_seed(1 + dist.get_rank())
    figures: Figures = {
        "digits, 32 examples a rank": overhead(
            lambda: convolutional_network(DigitsSection(name="digits", dropout=0.1), (1, 8, 8), 10),
            torch.randn(32, 1, 8, 8),
            10,
            4 * arguments.pairs,
        )
    }
    for examples in (16, 128):
        found = overhead(network, torch.randn(examples, INPUTS), OUTPUTS, arguments.pairs)
        figures[f"MLP of 25 M parameters, {examples} examples a rank"] = found
    return figures


def show(figures: Figures, ranks: int) -> str:
    header = ["watching on / off", "ratio (95 %)", "K", "a look", "other steps", "a step, ms"]
    rows = [
        [
            name,
            f"{each['ratio']:.4f} ({each['low']:.4f}-{each['high']:.4f})",
            f"{each['every']:.0f}",
            f"{each['look']:.2f}",
            f"{each['other']:.4f}",
            f"{1e3 * each['step']:.2f}",
        ]
        for name, each in figures.items()
    ]
    return f"What watching costs, {ranks} ranks ({machine()})\n\n{table(header, rows)}"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=120, help="of steps, four times as many for digits")


if __name__ == "__main__":
    sys.exit(run(__doc__, options, measure, show))
