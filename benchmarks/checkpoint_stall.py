"""What saving a checkpoint costs a step: how long `begin` holds it up, and how much slower steps are while a thread writes.

    python benchmarks/checkpoint_stall.py --parameters 25e6 --saves 4

One rank with so many float32 parameters and Adam's two moments. The steps beside it are forwards and backwards of a small
network, many short calls that all want the interpreter's lock. Pin it to one core (taskset -c 1) to see the worst case.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ddp.checkpoint import Saver
from ddp.checkpoint.space import in_words

DEADLINE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Steps:
    """Seconds of the steps that ran meanwhile."""

    mean_seconds: float
    longest_seconds: float
    all_seconds: float


def steps_until(is_over: Callable[[], bool]) -> Steps:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    inputs = torch.randn(32, 64)
    began = last = time.perf_counter()
    count, longest = 0, 0.0
    while not count or (not is_over() and last - began < DEADLINE_SECONDS):
        model(inputs).sum().backward()
        now = time.perf_counter()
        count, longest, last = count + 1, max(longest, now - last), now
    return Steps((last - began) / count, longest, last - began)


def measure(directory: Path, parameters: int, saves: int, alone_seconds: float) -> None:
    state = {name: torch.randn(parameters) for name in ("parameters", "exp_avg", "exp_avg_sq")}
    saver = Saver(directory, rank=0, world_size=1, keep=1)
    size = in_words(sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    print(f"| save of {size} | begin holds up | a step alone (longest) | while writing (longest) | written in |")
    print("| --- | --- | --- | --- | --- |")
    for step in range(1, saves + 1):
        until = time.perf_counter() + alone_seconds
        alone = steps_until(lambda until=until: time.perf_counter() > until)
        began = time.perf_counter()
        saver.begin(step, state, {})
        stall = time.perf_counter() - began
        beside = steps_until(lambda step=step: abs(saver.part_saved) == step)
        saver.finish(lambda mine: [mine])
        print(
            f"| {step} | {1e3 * stall:.0f} ms | {1e3 * alone.mean_seconds:.3f} ms ({1e3 * alone.longest_seconds:.0f}) | "
            f"{1e3 * beside.mean_seconds:.3f} ms ({1e3 * beside.longest_seconds:.0f}) | {beside.all_seconds:.1f} s |"
        )
    saver.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=25e6)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--alone-seconds", type=float, default=2.0)
    parser.add_argument("--directory", type=Path, help="on the file system to write to; a temporary one where left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        measure(Path(place) / "checkpoints", int(arguments.parameters), arguments.saves, arguments.alone_seconds)


if __name__ == "__main__":
    main()
