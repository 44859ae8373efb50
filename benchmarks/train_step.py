"""A whole training step: forward, backward through DDP, optimizer. MLP of 25 M float32 parameters, AdamW.

    python benchmarks/train_step.py [--ranks 2] [--rounds 21] [--examples 16 128] [--pairs 160] [--json FILE]

"bound" has a DDP hook that does nothing and fused AdamW: what a free all-reduce would give. "ours" is the trainer's
step, which keeps freed memory (`ddp.training.memory`); one row shows it without that. All contenders
live in the same processes and take turns; figures are medians in milliseconds of the slowest rank.

After that, what measuring costs: steps with everything on (preconditioned norms, layers, micro-batches, shards) against
steps with measurement off, in pairs, one of each in turn. Every fourth is a sampled step here; the ratio weighs them with
the interval K that the measured cost gives, and its interval comes from a bootstrap over pairs. Early in a run more
steps are sampled than every K-th: the last column has the ratio over all steps of runs of two lengths.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp.metering.measurement import NoiseMeasurement, Settings
from ddp.metering.observation import step_units
from ddp.noise.noise_scale import NoiseScaleWindow
from ddp.noise.sampling import SamplingCadence, relaxed
from ddp.noise.shards import ShardWatch
from ddp.noise.tracker import SETTLED_STEPS
from ddp.training.memory import keep_freed_memory
from ddp.transport.comm_hook import GradientExchange, comm_hook, register
from ddp.transport.row import StepRow
from ddp.transport.select import select_transport
from harness import Figures, interleaved_medians, machine, run, slowest_of_ranks, table

INPUTS, WIDTH, OUTPUTS, HIDDEN = 1024, 2048, 1000, 5
BOUND = "bound: idle hook, fused AdamW"
NO_SYNC = "no_sync, fused AdamW"
OURS = "ours"
OURS_WITH_NOISE = "ours with the noise scale"
GLOO = "DDP on Gloo, fused AdamW"
DEFAULT = "DDP on Gloo, PyTorch's defaults"
OURS_FRESH = "ours, memory given back each step"
SAMPLED, COST = 4, "cost of "
RUNS = (1_000, 10_000)  # steps
ORDER = (BOUND, NO_SYNC, OURS, OURS_WITH_NOISE, OURS_FRESH, GLOO, DEFAULT)


def network() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(INPUTS, WIDTH), nn.ReLU()]
    for _ in range(HIDDEN):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, OUTPUTS))


def idle_hook(_state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    """A hook that gives the bucket back as it is."""
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


def contender(name: str, examples: int) -> Callable[[], object]:
    """One training step of `name`, with a model and an optimizer of its own."""
    torch.manual_seed(0)
    fused = name != DEFAULT
    model = DistributedDataParallel(network(), gradient_as_bucket_view=fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if fused else None)
    torch.manual_seed(1 + dist.get_rank())
    inputs, targets = torch.randn(examples, INPUTS), torch.randint(OUTPUTS, (examples,))

    def compute() -> Tensor:
        keep_freed_memory(name in (OURS, OURS_WITH_NOISE))
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    if name == BOUND:
        register(model, None, idle_hook)
    if name in (OURS, OURS_WITH_NOISE, OURS_FRESH):
        return _ours(model, compute, update, examples, measure=name == OURS_WITH_NOISE)
    if name == NO_SYNC:
        return lambda: _without_sync(model, compute, update)
    return lambda: (compute(), update())


def _without_sync(model: DistributedDataParallel, compute: Callable[[], Tensor], update: Callable[[], None]) -> None:
    with model.no_sync():
        compute()
    update()


def _ours(
    model: DistributedDataParallel,
    compute: Callable[[], Tensor],
    update: Callable[[], None],
    examples: int,
    *,
    measure: bool,
) -> Callable[[], object]:
    """The trainer's way through a step, without its record."""
    exchange = GradientExchange(select_transport("shared_memory", "cpu", 120.0))
    register(model, exchange, comm_hook)
    window = NoiseScaleWindow(training_examples=None)

    def step() -> None:
        loss = compute()
        sums = exchange.take()
        if measure:
            row = StepRow(examples=examples, own_squared_norm=sums.own_squared_norm, loss_sum=loss.item())
            rows = [StepRow.unpack(each) for each in exchange.transport.exchange_row(row.pack())]
            units = step_units(rows)
            window.observe(units.units.moments(units.weighted_squared_norms, sums.mean_squared_norm))
        update()

    return step


class MeasuredStep:
    """The trainer's step with `micro_batches` backwards; measured or not."""

    def __init__(self, examples: int, micro_batches: int, *, measured: bool) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        self.exchange = GradientExchange(select_transport("shared_memory", "cpu", 120.0))
        register(self.model, self.exchange, comm_hook)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        torch.manual_seed(1 + dist.get_rank())
        self.inputs = torch.randn(examples, INPUTS).chunk(micro_batches)
        self.targets = torch.randint(OUTPUTS, (examples,)).chunk(micro_batches)
        self.examples, self.number, self.seconds = examples, 0, 0.0
        self.cadence = SamplingCadence("auto")
        settings = Settings(None, sample_every=SAMPLED)
        self.shards = ShardWatch() if measured else None
        self.measurement = (
            NoiseMeasurement(self.model.module, self.optimizer, self.exchange, settings) if measured else None
        )

    def __call__(self) -> None:
        began = time.perf_counter()
        self.number += 1
        if self.measurement is not None:
            self.measurement.begin(self.number, accumulates=len(self.inputs) > 1)
        loss_sum = sum(map(self._backward, range(len(self.inputs))))
        sums = self.exchange.take()
        fields = {} if self.measurement is None else self.measurement.row_fields()
        fields |= {"mean_squared_norm": sums.mean_squared_norm, "backward_seconds": self.seconds}
        row = StepRow(self.examples, sums.own_squared_norm, loss_sum, projection=sums.projection, **fields)
        rows = self.exchange.exchange_row(row)
        if self.shards is not None:
            norms, projections = [row.own_squared_norm for row in rows], [row.projection for row in rows]
            self.shards.observe(norms, projections, [row.examples for row in rows])
        if self.measurement is not None:
            self.measurement.observe(rows, sums)
            self.cadence.observe(max(each.measuring_seconds for each in rows), max(each.step_seconds for each in rows))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds = time.perf_counter() - began

    def _backward(self, part: int) -> float:
        last = part == len(self.inputs) - 1
        with nullcontext() if last else self.model.no_sync():
            loss = nn.functional.cross_entropy(self.model(self.inputs[part]), self.targets[part], reduction="sum")
            (loss / self.examples).backward()
        if self.measurement is not None:
            self.measurement.end_unit(len(self.targets[part]), self.examples)
        return loss.item()


def overhead(examples: int, micro_batches: int, pairs: int) -> dict[str, float]:
    """Seconds of a step with measurement on over those of one without, K, and a 95 % interval. Collective."""
    keep_freed_memory()
    off, on = (MeasuredStep(examples, micro_batches, measured=measured) for measured in (False, True))
    for _ in range(SETTLED_STEPS + 2 * SAMPLED):
        on()
    off()
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs):
        seconds = {step: _timed(step) for step in ((off, on) if pair % 2 else (on, off))}
        ratios[on.number % SAMPLED == 0].append(seconds[on] / seconds[off])
    return summarised(ratios, on.cadence.every)


def _timed(step: MeasuredStep) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    step()
    return slowest_of_ranks({"step": time.perf_counter() - began})["step"]


def summarised(ratios: Mapping[bool, Sequence[float]], every: int) -> dict[str, float]:
    """Medians of both kinds of steps, weighed by how often they come, resampled within each kind."""
    draw = np.random.default_rng(0)

    def weighed(of: Mapping[bool, Sequence[float]]) -> float:
        return statistics.median(of[False]) * (1 - 1 / every) + statistics.median(of[True]) / every

    resampled = [
        weighed({kind: draw.choice(each, len(each)).tolist() for kind, each in ratios.items()}) for _ in range(2000)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975)).tolist()
    plain, sampled = statistics.median(ratios[False]), statistics.median(ratios[True])
    found = {"ratio": weighed(ratios), "low": low, "high": high, "every": every, "plain": plain, "sampled": sampled}
    shares = {steps: sampled_share(every, steps) for steps in RUNS}
    return found | {f"run of {steps}": plain + (sampled - plain) * share for steps, share in shares.items()}


def sampled_share(every: int, steps: int) -> float:
    """Of the steps of a whole run."""
    last = taken = 0
    for step in range(1, steps + 1):
        if step - last >= min(every, relaxed(step)):
            last, taken = step, taken + 1
    return taken / steps


def show(figures: Figures, ranks: int) -> str:
    costs = {name: figures[name] for name in figures if name.startswith(COST)}
    steps = show_steps({name: each for name, each in figures.items() if name not in costs}, ranks)
    runs = ", ".join(f"{steps:,}" for steps in RUNS)
    header = [
        "everything on / off",
        "ratio (95 %)",
        "K",
        "a sampled step",
        "other steps",
        f"whole runs of {runs} steps",
    ]
    rows = [
        [
            name.removeprefix(COST),
            f"{each['ratio']:.4f} ({each['low']:.4f}-{each['high']:.4f})",
            f"{each['every']:.0f}",
            f"{each['sampled']:.3f}",
            f"{each['plain']:.4f}",
            ", ".join(f"{each[f'run of {steps}']:.4f}" for steps in RUNS),
        ]
        for name, each in costs.items()
    ]
    return f"{steps}\n\nWhat measuring costs\n\n{table(header, rows)}"


def show_steps(figures: Figures, ranks: int) -> str:
    header = ["ms a step (ratio to the bound)", *(f"{examples} examples a rank" for examples in figures)]
    rows = [
        [name, *(f"{1e3 * row[name]:.1f} ({row[name] / row[BOUND]:.2f})" for row in figures.values())] for name in ORDER
    ]
    return f"Training step, {ranks} ranks, 25 M float32 parameters ({machine()})\n\n{table(header, rows)}"


def measure(arguments: argparse.Namespace) -> Figures:
    """Seconds a step by examples a rank and contender; collective over all ranks."""
    figures: Figures = {}
    for examples in arguments.examples:
        contenders = {name: contender(name, examples) for name in ORDER}
        seconds = interleaved_medians(contenders, rounds=arguments.rounds, settle=1, prepare=dist.barrier)
        figures[str(examples)] = slowest_of_ranks(seconds)
        del contenders
    for examples, micro_batches in itertools.product(arguments.examples, (1, 2)):
        name = f"{COST}{examples} examples a rank in {micro_batches} micro-batch{'es' * (micro_batches > 1)}"
        figures[name] = overhead(examples, micro_batches, arguments.pairs)
    return figures


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 128], help="of a rank")
    parser.add_argument("--pairs", type=int, default=160, help="of steps, for what measuring costs")


if __name__ == "__main__":
    sys.exit(run(__doc__, options, measure, show))
