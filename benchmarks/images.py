"""Images a second of a residual network on made images of 224x224 pixels: training and inference, a rank and together.

    python benchmarks/images.py [--ranks 1 2] [--depth 18] [--size 224] [--examples 8] [--rounds 5] [--json FILE]

Training is the trainer's own step: data, forward, backward, all-reduce, SGD with momentum, without the noise scale.
Inference is the same network's forward in evaluation mode, without gradients. Each rank has one thread. "of the matrix
rate" is the floating-point operations a second (a multiplication and an addition are two) of convolutions and matrix
products, counted by torch's FlopCounterMode, over what a product of two 1024x1024 float32 matrices reaches with as many ranks
at the same time, by turns with the steps: at its best, since it is what the machine can do. The rest are medians of rounds,
each of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from ddp.job import Job, parse_job
from ddp.topology import from_environment
from ddp.training.data import to_device
from ddp.training.evaluation import evaluation_mode
from ddp.training.session import Session, session
from harness import machine, slowest_of_ranks, table
from places import FIGURES, Environment, Figures, inside_case, start_case

MATRIX = 1024
PRODUCTS = 10  # in a sample of the matrix rate
TRAINING, INFERENCE = "training", "inference"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--depth", type=int, default=18, help="of the network: 18, 34, 50, 101 or 152")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--examples", type=int, default=8, help="images of a rank in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if (case := inside_case()) is not None:
        return as_rank(int(case), arguments)
    environment = Environment.of(sys.executable)
    figures = {str(ranks): start_case(environment, ranks, str(ranks)) for ranks in arguments.ranks}
    print(show(figures, arguments), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine(), "ranks": figures}, indent=2) + "\n")
    return 0


def as_rank(ranks: int, arguments: argparse.Namespace) -> int:
    topology = from_environment(os.environ)
    with session(job_of(arguments, ranks), topology) as here:
        figures = measure(here, arguments)
    if topology.rank == 0:
        Path(os.environ[FIGURES]).write_text(json.dumps(figures))
    return 0


def job_of(arguments: argparse.Namespace, ranks: int) -> Job:
    return parse_job(
        {
            "run": {"steps": 1_000_000, "device": "cpu", "threads_per_rank": 1},
            "task": {"name": "synthetic_images", "depth": arguments.depth, "size": arguments.size},
            "batch": {"global_batch_size": ranks * arguments.examples, "micro_batch_size": arguments.examples},
            "optimizer": {"name": "sgd", "learning_rate": 1e-3, "momentum": 0.9},
            "noise_scale": {"enabled": False},
            "metrics": {"enabled": False},
        }
    )


def measure(here: Session, arguments: argparse.Namespace) -> Figures:
    """Of training and inference: seconds a step, operations a step on one rank, and operations a second of products."""
    steps = here.steps()
    model = here.trainer.model.module
    images, _ = to_device(next(steps).micro_batches[0], here.device)
    factors = torch.rand(2, MATRIX, MATRIX)

    def infer() -> None:
        with evaluation_mode(model), torch.no_grad():
            model(images)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(factors[0], factors[1])

    calls: Mapping[str, Callable[[], object]] = {
        TRAINING: lambda: here.trainer.step(steps),
        INFERENCE: infer,
        "products": multiply,
    }
    operations = {name: _operations(calls[name]) for name in (TRAINING, INFERENCE)}
    samples = _samples(calls, arguments.rounds)
    rate = 2 * MATRIX**3 * PRODUCTS / min(samples["products"])
    return {
        name: {"seconds": statistics.median(samples[name]), "operations": operations[name], "matrix_rate": rate}
        for name in (TRAINING, INFERENCE)
    }


def _operations(call: Callable[[], object]) -> float:
    """Floating-point operations of convolutions and matrix products; warms up, too."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _samples(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank in each round, which the calls take by turns. Collective."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            dist.barrier()
            began = time.perf_counter()
            call()
            slowest = slowest_of_ranks({name: time.perf_counter() - began})[name]
            if round_:  # the first is for warming up
                samples[name].append(slowest)
    return samples


def show(figures: Mapping[str, Figures], arguments: argparse.Namespace) -> str:
    title = (
        f"ResNet-{arguments.depth} on images of {arguments.size}x{arguments.size}, {arguments.examples} a rank and step, one "
        f"thread a rank ({machine()})"
    )
    header = [
        "",
        "ranks",
        "images/s a rank",
        "images/s together",
        "GFLOP an image",
        "GFLOP/s a rank",
        "of the matrix rate",
    ]
    rows = [
        _line(what, ranks, found[what], arguments.examples)
        for what in (TRAINING, INFERENCE)
        for ranks, found in figures.items()
    ]
    return f"{title}\n\n{table(header, rows)}"


def _line(what: str, ranks: str, found: Mapping[str, float], examples: int) -> list[str]:
    images, rate = examples / found["seconds"], found["operations"] / found["seconds"]
    return [
        *(what, ranks, f"{images:.2f}", f"{int(ranks) * images:.2f}", f"{found['operations'] / examples / 1e9:.2f}"),
        f"{rate / 1e9:.1f}",
        f"{rate / found['matrix_rate']:.0%} of {found['matrix_rate'] / 1e9:.1f} GFLOP/s",
    ]


if __name__ == "__main__":
    sys.exit(main())
