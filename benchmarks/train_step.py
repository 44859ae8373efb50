"""A whole training step: forward, backward through DDP, optimizer. MLP of 25 M float32 parameters, AdamW.

    python benchmarks/train_step.py [--ranks 2] [--rounds 21] [--examples 16 128] [--json FILE]

"bound" has a DDP hook that does nothing and fused AdamW: what a free all-reduce would give. "ours" is the trainer's
step, which keeps freed memory (`ddp.training.memory`); one row shows it without that. All contenders
live in the same processes and take turns; figures are medians in milliseconds of the slowest rank.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp.metering.observation import observe_step
from ddp.noise.noise_scale import NoiseScaleWindow
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
            observe_step(window, rows, sums.mean_squared_norm)
        update()

    return step


def show(figures: Figures, ranks: int) -> str:
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
    return figures


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 128], help="of a rank")


if __name__ == "__main__":
    sys.exit(run(__doc__, options, measure, show))
