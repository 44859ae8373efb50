"""The practitioners' case: a small convolutional network learns to read letters, and how long that takes.

    python benchmarks/letters.py [--path FOLDER [--prefix emnist-letters]] [--target 0.8] [--seeds 3] [--ranks 2] [--json FILE]

The folder holds IDX files, of EMNIST's letters for example; without one, scikit-learn's digits are taken, turned by up to
60 degrees and shifted by up to a fifth (`letters_data`). The network has two convolutions of 16 and 32 channels and 128 units, GELU,
and each rank has one thread.

Rows: plain SGD and Adam at the learning rate that torch gives them, 1e-3, with batches of 32; both at the rate that the
range test finds (`ddp find-lr`: half-way down); Adam with that rate on two ranks; and there with the batch that the noise scale advises, the
rate following by the square root of it. Advised is the noise scale itself, in Adam's metric, as it stands where the accuracy
is reached, in runs of their own. "CPU" is processor time of all ranks and threads, "wall" what a clock shows; both of the
steps alone, without starting up and evaluating (`letters_runs` says how). What finding costs stands in rows of its own.
Medians over seeds; factors are against the first row, which has one seed: its tens of thousands of steps are slow.

Last, the parallel efficiency: seconds of the same steps on one rank over those on N ranks, and over N.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ddp.topology import from_environment
from harness import machine, table
from letters_data import write_letters
from letters_runs import Found, Images, answer
from places import FIGURES, Environment, inside_case, start_case

BATCH, DEFAULT_RATE = 32, 1e-3  # torch.optim.SGD's and Adam's own


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the answers of all seeds."""

    name: str
    ranks: int
    batch: int
    answers: Sequence[Found]

    def median(self, figure: str) -> float:
        return statistics.median(each[figure] for each in self.answers)

    @property
    def reached(self) -> bool:
        return all(each.get("reached", 1.0) for each in self.answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of IDX files")
    parser.add_argument("--prefix", help="which of the sets in the folder")
    parser.add_argument("--target", type=float, default=0.8, help="validation accuracy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of a run's steps; then it is given up")
    parser.add_argument("--find-steps", type=int, default=300, help="of a pass of the range test")
    parser.add_argument("--pace-steps", type=int, default=150, help="for the efficiency; 0: leave it out")
    parser.add_argument("--pace-rounds", type=int, default=3, help="starts of each number of ranks for the efficiency")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if (case := inside_case()) is not None:
        return as_rank(json.loads(case))
    with tempfile.TemporaryDirectory(prefix="ddp-letters-") as folder:
        if arguments.path is None:
            write_letters(Path(folder))
        path = os.path.abspath(arguments.path or folder)
        images = Images(path, arguments.prefix, arguments.target, arguments.limit, arguments.find_steps)
        bench = Bench(images, arguments.seeds, arguments.ranks)
        rows = bench.rows()
        batches = sorted({BATCH, rows[-1].batch, 16 * BATCH})
        efficiency = (
            bench.efficiency(batches, arguments.pace_steps, arguments.pace_rounds) if arguments.pace_steps else []
        )
    print(
        show(rows, arguments), *([show_efficiency(efficiency, arguments)] if efficiency else []), sep="\n\n", flush=True
    )
    if arguments.json:
        figures = {"machine": machine(), "rows": [asdict(row) for row in rows], "efficiency": efficiency}
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def as_rank(case: dict[str, Any]) -> int:
    topology = from_environment(os.environ)
    answers = answer(Images(**case["images"]), case["requests"], topology)
    if topology.rank == 0:
        Path(os.environ[FIGURES]).write_text(json.dumps({str(n): each for n, each in enumerate(answers)}))
    return 0


class Bench:
    """Asks ranks, which start once for all that one number of them is asked."""

    def __init__(self, images: Images, seeds: int, ranks: int) -> None:
        self.images, self.seeds, self.ranks = images, range(seeds), ranks
        self.environment = Environment.of(sys.executable)

    def rows(self) -> list[Row]:
        alone = self._one_rank()
        rates = [DEFAULT_RATE if math.isnan(each["found"]) else each["found"] for each in alone[3].answers]
        together = self._all_ranks(rates)
        return [*alone, *together]

    def efficiency(self, batches: Sequence[int], steps: int, rounds: int) -> list[Found]:
        """At each batch; of starts with one rank and with all by turns."""
        requests = [
            {
                "kind": "pace",
                "optimizer": "adam",
                "learning_rate": DEFAULT_RATE,
                "batch": batch,
                "seed": 0,
                "steps": steps,
            }
            for batch in batches
        ]
        starts = [(self._ask(1, requests), self._ask(self.ranks, requests)) for _ in range(rounds)]
        return [
            {
                "batch": batch,
                "alone": statistics.median(alone[n]["wall"] for alone, _ in starts),
                "together": statistics.median(together[n]["wall"] for _, together in starts),
                "efficiency": statistics.median(
                    alone[n]["wall"] / together[n]["wall"] / self.ranks for alone, together in starts
                ),
            }
            for n, batch in enumerate(batches)
        ]

    def _one_rank(self) -> list[Row]:
        kinds = {
            "SGD, torch's rate": ("train", "sgd", DEFAULT_RATE, self.seeds[:1]),
            "Adam, torch's rate": ("train", "adam", DEFAULT_RATE, self.seeds),
            "finding SGD's rate": ("find", "sgd", DEFAULT_RATE, self.seeds),
            "finding Adam's rate": ("find", "adam", DEFAULT_RATE, self.seeds),
            "SGD, found rate": ("train", "sgd", "found", self.seeds),
            "Adam, found rate": ("train", "adam", "found", self.seeds),
        }
        requests = [
            {"kind": kind, "optimizer": optimizer, "learning_rate": rate, "batch": BATCH, "seed": seed}
            for kind, optimizer, rate, seeds in kinds.values()
            for seed in seeds
        ]
        answers = iter(self._ask(1, requests))
        return [Row(name, 1, BATCH, list(islice(answers, len(seeds)))) for name, (*_, seeds) in kinds.items()]

    def _all_ranks(self, rates: Sequence[float]) -> list[Row]:
        found = [
            {"kind": "train", "optimizer": "adam", "learning_rate": rate, "batch": BATCH, "seed": seed}
            for seed, rate in zip(self.seeds, rates, strict=True)
        ]
        answers = self._ask(self.ranks, [*found, *({**each, "measured": True} for each in found)])
        plain, measured = answers[: len(found)], answers[len(found) :]
        advised = advised_batch([each["noise_scale"] for each in measured], self.ranks)
        larger = self._ask(self.ranks, [{**each, "batch": advised, "tuned_batch_size": BATCH} for each in found])
        return [
            Row("Adam, found rate", self.ranks, BATCH, plain),
            Row("measuring the noise scale", self.ranks, BATCH, measured),
            Row("Adam, found rate, advised batch", self.ranks, advised, larger),
        ]

    def _ask(self, ranks: int, requests: Sequence[dict[str, Any]]) -> list[Found]:
        case = json.dumps({"images": asdict(self.images), "requests": requests})
        return list(start_case(self.environment, ranks, case).values())


def advised_batch(noise_scales: Sequence[float], ranks: int) -> int:
    """The median noise scale, rounded to what the ranks can share evenly; the batch there was, where none is known."""
    known = [each for each in noise_scales if math.isfinite(each)]
    return max(1, round(statistics.median(known) / ranks)) * ranks if known else BATCH


def show(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    source = arguments.path or "digits at 28x28, turned and shifted"
    title = f"To {arguments.target:.0%} validation accuracy on {source}, {arguments.seeds} seeds ({machine()})"
    header = ["", "ranks", "batch", "rate", "steps", "examples", "CPU", "wall", "CPU less by", "wall less by"]
    return f"{title}\n\n{table(header, [_line(row, rows[0]) for row in rows])}"


def _line(row: Row, first: Row) -> list[str]:
    start = [row.name, str(row.ranks), str(row.batch)]
    seconds = {name: row.median(name) for name in ("cpu", "wall")}
    times = [f"{'' if row.reached else '> '}{each:.2f} s" for each in seconds.values()]
    if "found" in row.answers[0]:
        return [*start, f"{row.median('found'):.2g}", "", "", *times, "", ""]
    if any(math.isnan(each["learning_rate"]) for each in row.answers):
        return [*start, "none found", "", "", "", "", "", ""]
    factors = [_factor(first, row, name) for name in seconds]
    counts = [f"{row.median(name):,.0f}" for name in ("steps", "examples")]
    return [*start, f"{row.median('learning_rate'):.2g}", *counts, *times, *factors]


def _factor(first: Row, row: Row, figure: str) -> str:
    if not row.reached:
        return "not reached"
    return f"{'' if first.reached else '> '}{first.median(figure) / row.median(figure):.1f}"


def show_efficiency(found: Sequence[Found], arguments: argparse.Namespace) -> str:
    ranks, steps, rounds = arguments.ranks, arguments.pace_steps, arguments.pace_rounds
    title = f"{steps} steps on 1 and on {ranks} ranks of one thread each, medians of {rounds} starts of each by turns"
    header = ["batch", "1 rank", f"{ranks} ranks", "parallel efficiency"]
    rows = [
        [f"{each['batch']:.0f}", f"{each['alone']:.2f} s", f"{each['together']:.2f} s", f"{each['efficiency']:.2f}"]
        for each in found
    ]
    return f"{title}\n\n{table(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
