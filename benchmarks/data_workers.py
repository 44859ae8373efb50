"""What `[data] workers` gives: a step's time where fetching a micro-batch takes 5 ms and computing on it about as long.

    python benchmarks/data_workers.py [--ranks 1 2] [--workers 0 1 2] [--steps 200] [--fetch-ms 5]

Real runs under torchrun, each with one micro-batch a step. "wait" is a data set that sleeps, as one does that reads from
elsewhere; "work" is Python that keeps a core busy. Of each run it shows the median step, and of that what the rank
spent on data, after a tenth of the steps. Workers that work need cores beside those of the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ddp.tasks.base import Goal, TensorExamples
from ddp.telemetry.recording import open_recording, read_steps
from harness import machine

EXAMPLES, INPUTS, MICRO_BATCH = 4_096, 256, 64

JOB = """
run = {{ id = "run", steps = {steps}, device = "cpu", threads_per_rank = 1 }}
task = {{ name = "data_workers:Slow", options = {{ kind = "{kind}", milliseconds = {milliseconds} }} }}
batch = {{ examples_per_rank = {micro_batch}, micro_batch_size = {micro_batch} }}
optimizer = {{ name = "sgd", learning_rate = 0.01 }}
data = {{ workers = {workers} }}
evaluation = {{ metric = "loss", every_steps = 1000000 }}
metrics = {{ enabled = false }}
"""


class SlowExamples(TensorExamples):
    """`fetch_seconds` for each micro-batch, asleep or at work."""

    def __init__(self, kind: str, fetch_seconds: float, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.kind, self.fetch_seconds = kind, fetch_seconds

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        if self.kind == "wait":
            time.sleep(self.fetch_seconds)
        else:
            until = time.thread_time() + self.fetch_seconds
            while time.thread_time() < until:
                sum(range(100))
        return super().__getitems__(indices)


class Slow:
    """A network whose forward and backward take a few milliseconds."""

    goals: Mapping[str, Goal] = {}

    def __init__(self, kind: str, milliseconds: float) -> None:
        self.kind, self.fetch_seconds = kind, milliseconds / 1e3

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        x = torch.randn(EXAMPLES, INPUTS, generator=torch.Generator().manual_seed(0))
        tensors = (x, x.sum(dim=1))
        few = (each[:MICRO_BATCH] for each in tensors)
        return SlowExamples(self.kind, self.fetch_seconds, *tensors), TensorExamples(*few)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]).square()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {}


def measured(kind: str, milliseconds: float, ranks: int, workers: int, steps: int) -> tuple[float, float]:
    """Medians of a run, in seconds: a step, and of that the slowest rank's time for data."""
    with tempfile.TemporaryDirectory() as folder:
        job = JOB.format(kind=kind, milliseconds=milliseconds, workers=workers, steps=steps, micro_batch=MICRO_BATCH)
        Path(folder, "job.toml").write_text(job)
        here = Path(__file__).resolve().parent
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, "-m", "ddp", "train", "job.toml", "--allow-import", "data_workers"]
        path = os.pathsep.join([str(here), str(here.parent)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if ended.returncode:
            raise SystemExit(ended.stderr)
        with contextlib.closing(open_recording(Path(folder, "runs", "run", "run.db"))) as database:
            records = list(read_steps(database))[steps // 10 :]
    data = [max(phases["data"] for phases in record.phase_seconds) for record in records]
    return statistics.median(record.duration_seconds for record in records), statistics.median(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fetch-ms", type=float, default=5.0)
    options = parser.parse_args()
    print(machine(), "", "| ranks | fetching | workers | step | of that data |", "|---|---|---|---|---|", sep="\n")
    for ranks in options.ranks:
        for kind in ("wait", "work"):
            for workers in options.workers:
                step, data = measured(kind, options.fetch_ms, ranks, workers, options.steps)
                print(f"| {ranks} | {kind} | {workers} | {1e3 * step:.1f} ms | {1e3 * data:.2f} ms |", flush=True)


if __name__ == "__main__":
    main()
