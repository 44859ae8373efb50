"""Is a batch that adapts itself as fast as the best fixed one, without the sweep that finds that?

    python benchmarks/adaptive_batch.py [--quick] [--ranks 2] [--tasks digits text] [--seeds 3] [--results FOLDER]

Trains to a loss with every fixed batch of 16 to 256 examples and from each of them with `global_batch_size = "auto"`,
by the real trainer, all with one learning rate, tuned at one batch size, and the same rule for the others. Times are
sums of step durations; seeds are outermost, so that a machine whose speed changes is as fair to one as to another.
With --results each run is kept in FOLDER, and a benchmark that is started again goes on. Then the same way through the
noise scales is timed by an alpha-beta model for more ranks than there are here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from adaptive_analysis import Machine, Run, Way, affine_cost, collective_seconds, neighbours, way_of
from ddp.board import PhaseBoard
from ddp.errors import StoppedError
from ddp.job import Job, parse_job
from ddp.process_group import initialise, shutdown
from ddp.telemetry.records import (
    BatchChange,
    Sink,
    StepRecord,
)
from ddp.telemetry.sinks import Sinks
from ddp.topology import from_environment
from ddp.training.building import build_trainer
from ddp.training.loop import Loop
from ddp.training.plan import plan_run
from ddp.training.saving import SaveNews
from ddp.training.signals import StopRequest
from ddp.transport.comm_hook import GradientExchange
from ddp.transport.select import select_transport
from harness import Environment, inside_ranks, machine, start_ranks, table
from places import Place

SIZES = (16, 32, 64, 128, 256)
QUICK_SIZES = (16, 64, 256)
ALPHA_SECONDS, BETA_SECONDS = 5e-6, 1e-10  # a message's latency, and a byte at 10 GB/s
SIMULATED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Problem:
    """A task small enough to be trained sixty times, and the loss that ends a run."""

    task: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    target: float
    quick_target: float
    smoothing: int  # examples that the loss is averaged over
    most_steps: int


PROBLEMS = {
    "digits": Problem(
        task={"name": "digits", "channels": 8, "batch_norm": False},
        optimizer={"name": "sgd", "learning_rate": 0.005, "momentum": 0.9, "tuned_batch_size": 64},
        target=0.02,
        quick_target=0.2,
        smoothing=1472,
        most_steps=12000,
    ),
    "text": Problem(
        task={"name": "text", "context_length": 32, "layers": 1, "heads": 2, "width": 32, "validation_examples": 64},
        optimizer={"name": "adam", "learning_rate": 3e-3, "tuned_batch_size": 64},
        target=1.95,
        quick_target=2.6,
        smoothing=2048,
        most_steps=6000,
    ),
}


@dataclass(frozen=True, order=True)
class Setting:
    """One run: a fixed batch, or where one that adapts itself starts."""

    task: str
    adapts: bool
    batch: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{'auto' if self.adapts else 'fixed'}-{self.batch}-{self.seed}"

    def job(self) -> Job:
        problem = PROBLEMS[self.task]
        batch: dict[str, Any] = {"global_batch_size": self.batch}
        if self.adapts:
            batch = {"global_batch_size": "auto", "initial": self.batch, "smallest": 8, "largest": 512}
        batch["micro_batch_size"] = 512 if self.adapts else self.batch
        return parse_job(
            {
                "run": {"seed": self.seed, "steps": problem.most_steps, "device": "cpu"},
                "task": dict(problem.task),
                "batch": batch,
                "optimizer": dict(problem.optimizer),
                "noise_scale": {"layers": False},
                "evaluation": {"metric": "loss"},
                "checkpoint": {"keep_best": 0},
            }
        )


@dataclass
class Recorder(Sink):
    """Keeps what the analysis needs of each step, and stops the run when its loss is there."""

    target: float
    smoothing: int
    stop: StopRequest
    steps: dict[str, list[float]] = field(
        default_factory=lambda: {"examples": [], "seconds": [], "loss": [], "noise_scale": [], "batch": []}
    )
    changes: list[dict[str, Any]] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        reading = record.reading
        known = reading is not None and reading.state in ("resolved", "wide")
        self.steps["examples"].append(record.examples)
        self.steps["seconds"].append(record.duration_seconds)
        self.steps["loss"].append(record.loss)
        self.steps["noise_scale"].append(reading.noise_scale if reading is not None and known else math.nan)
        self.steps["batch"].append(record.global_batch_size)
        if self._newest_loss() <= self.target:
            self.stop.signal_name = "the target"

    def _newest_loss(self) -> float:
        """As `Run.smoothed_loss` has it, of the newest step alone."""
        count = total = 0.0
        for examples, loss in zip(reversed(self.steps["examples"]), reversed(self.steps["loss"]), strict=True):
            count, total = count + examples, total + examples * loss
            if count >= self.smoothing:
                return total / count
        return math.inf

    def batch_change(self, record: BatchChange) -> None:
        self.changes.append(asdict(record))


def train(setting: Setting, target: float) -> dict[str, Any]:
    """One run on all ranks, to the target or to the most steps; rank 0 has what it recorded."""
    job, stop = setting.job(), StopRequest()
    plan = plan_run(job, dist.get_world_size(), dist.get_rank(), allow_import=())
    exchange = GradientExchange(select_transport("auto", "cpu", 120.0))
    recorder = Recorder(target, PROBLEMS[setting.task].smoothing, stop)
    sinks = Sinks([recorder] if dist.get_rank() == 0 else [])
    with tempfile.TemporaryDirectory(prefix="ddp-benchmark-") as folder:
        board = PhaseBoard.make(dist.get_rank())
        trainer = build_trainer(
            job, plan, exchange, torch.device("cpu"), stop, sinks=sinks, checkpoints=Path(folder), board=board
        )
        trainer.saving.finish = lambda step, value: (Path(), SaveNews(step, True, "", 0.0, 0.0))
        trainer.settle()
        try:
            Loop(trainer).run()
        except StoppedError:
            dist.barrier()
    exchange.transport.close()
    parameters = sum(each.numel() for each in plan.module.parameters())
    return {"steps": recorder.steps, "changes": recorder.changes, "gradient_bytes": 4 * parameters}


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """Seeds outermost; fixed and adaptive runs in turn."""
    sizes = QUICK_SIZES if arguments.quick else SIZES
    return [
        Setting(task, adapts, size, seed)
        for seed in range(1 if arguments.quick else arguments.seeds)
        for task in arguments.tasks
        for size in sizes
        for adapts in (False, True)
    ]


def target_of(task: str, quick: bool) -> float:
    return PROBLEMS[task].quick_target if quick else PROBLEMS[task].target


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Train what is not in the folder yet; collective."""
    there = [set(os.listdir(folder)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(there)
    for setting in settings_of(arguments):
        if f"{setting.name}.json" in (there[0] or ()):
            continue
        result = train(setting, target_of(setting.task, arguments.quick))
        if dist.get_rank() == 0:
            (folder / f"{setting.name}.part").write_text(json.dumps(result))
            (folder / f"{setting.name}.part").rename(folder / f"{setting.name}.json")
            seconds, steps = sum(result["steps"]["seconds"]), len(result["steps"]["loss"])
            print(f"{setting.name}: {steps} steps, {seconds:.1f} s", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Recorded:
    """A finished setting, read back."""

    setting: Setting
    run: Run
    batch: Sequence[float]
    changes: Sequence[Mapping[str, Any]]
    gradient_bytes: float

    @classmethod
    def read(cls, folder: Path, setting: Setting) -> Recorded:
        stored = json.loads((folder / f"{setting.name}.json").read_text())
        steps = {name: np.array(values, dtype=np.float64) for name, values in stored["steps"].items()}
        batch = steps.pop("batch").tolist()
        return cls(setting, Run(**steps), batch, stored["changes"], stored["gradient_bytes"])


class Comparison:
    """All runs of one task: times to the target, medians over seeds."""

    def __init__(self, runs: Iterable[Recorded], target: float, smoothing: int) -> None:
        self.runs, self.target, self.smoothing = list(runs), target, smoothing
        self.sizes = sorted({each.setting.batch for each in self.runs})
        self.fixed = {size: self._seconds(size, adapts=False) for size in self.sizes}
        self.adaptive = {size: self._seconds(size, adapts=True) for size in self.sizes}
        self.best = min(self.fixed, key=self.fixed.__getitem__)
        self.a, self.c = affine_cost([(size, self.step_seconds(size)) for size in self.sizes])

    def _of(self, size: int, *, adapts: bool) -> list[Recorded]:
        return [each for each in self.runs if each.setting.batch == size and each.setting.adapts == adapts]

    def _seconds(self, size: int, *, adapts: bool) -> float:
        return median(each.run.seconds_to(self.target, self.smoothing) for each in self._of(size, adapts=adapts))

    def modelled(self, size: int, *, adapts: bool) -> float:
        """As `_seconds`, with a + c b for each step: what a machine takes whose speed does not change meanwhile."""
        seconds: list[float] = []
        for each in self._of(size, adapts=adapts):
            steps = each.run.steps_to(self.target, self.smoothing)
            seconds.append(math.inf if steps is None else float((self.a + self.c * each.run.examples[:steps]).sum()))
        return median(seconds)

    def steps(self, size: int, *, adapts: bool) -> float:
        """To the target; infinite where it was not reached."""
        found = [each.run.steps_to(self.target, self.smoothing) for each in self._of(size, adapts=adapts)]
        return median(math.inf if steps is None else steps for steps in found)

    def step_seconds(self, size: int) -> float:
        return median(float(np.median(each.run.seconds)) for each in self._of(size, adapts=False))

    def ends(self, size: int) -> list[float]:
        """The batch that each seed ended with, from this start."""
        return [each.batch[-1] for each in self._of(size, adapts=True)]

    def way(self) -> Way:
        """The noise scale along the best fixed runs, end to end."""
        ways = [
            way_of(each.run, each.run.steps_to(self.target, self.smoothing) or len(each.run.loss))
            for each in self._of(self.best, adapts=False)
        ]
        return Way(np.concatenate([way.noise_scale for way in ways]), np.concatenate([way.ds for way in ways]))

    def longest_way(self) -> Way:
        """Of one run, that of the first seed, for simulations that go through it once."""
        run = self._of(self.best, adapts=False)[0].run
        return way_of(run, run.steps_to(self.target, self.smoothing) or len(run.loss))


def show(comparison: Comparison, task: str, quick: bool) -> str:
    """The measured table of one task and what it says."""
    best = comparison.fixed[comparison.best]
    steady = min(comparison.modelled(size, adapts=False) for size in comparison.sizes)
    rows = [
        [
            str(size),
            f"{1e3 * comparison.step_seconds(size):.2f}",
            f"{comparison.steps(size, adapts=False):.0f}",
            f"{comparison.fixed[size]:.2f} s",
            f"{comparison.fixed[size] / best:.2f}",
            f"{comparison.modelled(size, adapts=False) / steady:.2f}",
            f"{comparison.steps(size, adapts=True):.0f}",
            f"{comparison.adaptive[size]:.2f} s",
            f"{comparison.adaptive[size] / best:.2f}",
            f"{comparison.modelled(size, adapts=True) / steady:.2f}",
            " ".join(f"{end:.0f}" for end in comparison.ends(size)),
        ]
        for size in comparison.sizes
    ]
    header = ["batch or start", "ms a step"]
    for kind in ("fixed", "auto"):
        header += [f"{kind}: steps", "time", "/ best fixed", "at a + c b"]
    header.append("auto ends at")
    title = f"{task}: time to a training loss of {target_of(task, quick)}, medians over seeds"
    note = (
        '"at a + c b": the same ratio with every step at the fitted cost, for a machine whose speed changed meanwhile'
    )
    return f"{title}\n\n{table(header, rows)}\n\n{note}\n{verdict(comparison)}"


def verdict(comparison: Comparison) -> str:
    way, best = comparison.way(), comparison.fixed[comparison.best]
    share = comparison.a / (comparison.c * way.mean)
    worst = max(comparison.adaptive.values()) / best
    steady = min(comparison.modelled(size, adapts=False) for size in comparison.sizes)
    worst_modelled = max(comparison.modelled(size, adapts=True) for size in comparison.sizes) / steady
    saved = "; ".join(saved_text(comparison, size) for size in neighbours(comparison.sizes, comparison.best))
    fastest = math.sqrt(way.mean * comparison.a / comparison.c)
    inside = "between 0.4 and 2.5, where 25 % is to be saved" if 0.4 <= share <= 2.5 else "outside of 0.4 to 2.5"
    return (
        f"best fixed batch {comparison.best}; auto takes at most {worst:.2f} of its time, {worst_modelled:.2f} at a + c b (wanted: 1.15)\n"
        f"against a fixed batch 4 times off, auto from there saves {saved or '(no such size was run)'}\n"
        f"a step takes {1e3 * comparison.a:.2f} ms + {1e3 * comparison.c:.4f} ms an example; mean noise scale "
        f"{way.mean:.0f}: a/(cB) = {share:.2f}, {inside}; sqrt(B a/c) = {fastest:,.0f}\n"
        f"gamma = {way.gamma:.3f}: no moving batch can save more than {100 * way.bound:.1f} % of the best fixed one's time"
    )


def saved_text(comparison: Comparison, size: int) -> str:
    """By a run that starts at `size` and adapts itself, of what the fixed one takes."""
    measured = 1 - comparison.adaptive[size] / comparison.fixed[size]
    modelled = 1 - comparison.modelled(size, adapts=True) / comparison.modelled(size, adapts=False)
    return f"{100 * measured:.0f} % at {size} ({100 * modelled:.0f} % at a + c b)"


def show_simulated(comparison: Comparison, ranks_here: int) -> str:
    """The recorded way on more ranks: a grows with the all-reduce, c shrinks."""
    way, bytes_ = comparison.longest_way(), comparison.runs[0].gradient_bytes
    rows: list[list[str]] = []
    for ranks in SIMULATED_RANKS:
        extra = collective_seconds(ranks, bytes_, ALPHA_SECONDS, BETA_SECONDS)
        there = Machine(comparison.a + extra, comparison.c * ranks_here / ranks, smallest=ranks)
        batch, seconds = there.best_fixed(way)
        followed = [there.followed(way, start) / seconds for start in (16, 256, 4096)]
        rows.append(
            [
                f"{ranks:,}",
                f"{1e3 * there.a:.2f}",
                f"{there.a / (there.c * way.mean):.2f}",
                f"{batch:,.0f}",
                f"{seconds:.2f} s",
                f"{there.free(way) / seconds:.3f}",
                " / ".join(f"{value:.2f}" for value in followed),
                f"{there.fixed(way, max(batch / 4, ranks)) / seconds:.2f} / {there.fixed(way, 4 * batch) / seconds:.2f}",
            ]
        )
    header = [
        "ranks",
        "a, ms",
        "a/(cB)",
        "best fixed",
        "its time",
        "free",
        "auto from 16 / 256 / 4,096",
        "fixed 1/4 / 4 x",
    ]
    return (
        f"simulated: a plus an all-reduce of {bytes_ / 1e3:.0f} kB (alpha {1e6 * ALPHA_SECONDS:.0f} us a message, beta "
        f"{1e-9 / BETA_SECONDS:.0f} GB/s), c shared by the ranks, at least one example each; shares of the best fixed time"
        f"\n\n{table(header, rows)}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three sizes and an easier target")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=sorted(PROBLEMS), default=sorted(PROBLEMS))
    parser.add_argument("--results", metavar="FOLDER", help="keep each run there, and go on from what is there")
    return parser.parse_args()


def inside(arguments: argparse.Namespace) -> int:
    """One rank of them all."""
    topology = from_environment(os.environ)
    Place.of(arguments.ranks).take(topology.local_rank)
    torch.set_num_threads(1)
    initialise(topology, "cpu", 120.0)
    with tempfile.TemporaryDirectory(prefix="ddp-benchmark-") as temporary:
        folder = Path(arguments.results or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(arguments, folder)
        if topology.rank == 0:
            report(arguments, folder)
        dist.barrier()
    shutdown()
    return 0


def report(arguments: argparse.Namespace, folder: Path) -> None:
    print(f"{arguments.ranks} ranks ({machine()})")
    for task in arguments.tasks:
        runs = [Recorded.read(folder, setting) for setting in settings_of(arguments) if setting.task == task]
        comparison = Comparison(runs, target_of(task, arguments.quick), PROBLEMS[task].smoothing)
        print(
            f"\n{show(comparison, task, arguments.quick)}\n\n{show_simulated(comparison, arguments.ranks)}", flush=True
        )


def main() -> int:
    arguments = parse()
    return inside(arguments) if inside_ranks() else start_ranks(Environment.of(sys.executable), arguments.ranks, {})


if __name__ == "__main__":
    sys.exit(main())
