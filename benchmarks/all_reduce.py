"""All-reduce of float32 gradients on one node: ours and its peers, beside scaling and copying the same bytes.

    python benchmarks/all_reduce.py [--ranks 2 4] [--sizes 4KiB 25MiB] [--only "in place" ours] [--json FILE]
    python benchmarks/all_reduce.py --busy-neighbour --sizes 25MiB
    python benchmarks/all_reduce.py --mpi openmpi --levels multiple --only "in place" ours     # quick, while tuning

Ours includes both squared norms and the mean; the peers only sum. Figures are medians in milliseconds of the
slowest rank. "in place" is every rank scaling its own copy of the same bytes at once, what an all-reduce that
touches each byte once can reach; "copy" is every rank copying another buffer there.

Open MPI and MPICH cannot live in one process: ranks are started in the environment of each by turns (.venv and
.venv-mpich, see the Makefile), at thread level MPI_THREAD_FUNNELED and then MPI_THREAD_MULTIPLE, which suit different sizes.
Whatever is compared ran in the same processes, taking turns; ratios are taken there, and then their median. A peer
counts with its better level; "drift" is how far "in place" went between starts (largest / smallest).

Ranks are pinned to a core each, unless there are more ranks than cores or a busy neighbour: --placement says
otherwise, "pinned" with more ranks than cores puts them on the cores in turn. Every contender has --seconds for
each size, and no fewer than three rounds. DeepSpeed's shared-memory op takes part where it is installed, with a compiler:

    pip install --no-deps --target DIR deepspeed ninja py-cpuinfo hjson msgpack einops tqdm
    PYTHONPATH=DIR python benchmarks/all_reduce.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from contenders import COPY, DEEPSPEED, FLOORS, GLOO, IN_PLACE, TRANSPORTS, Contenders
from ddp.transport.base import BucketState
from harness import Neighbour, SampleLimits, machine, medians_within, slowest_of_ranks, table
from places import Environment, Figures, Place, environments, inside_case, rank_group, start_case

SIZES = ("4KiB", "64KiB", "1MiB", "25MiB", "100MiB", "400MiB")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
LEVELS = ("funneled", "multiple")
MPI_NAMES = {"openmpi": "Open MPI", "mpich": "MPICH"}
CONTENDERS = (IN_PLACE, COPY, *TRANSPORTS, GLOO, *MPI_NAMES.values(), DEEPSPEED)
ONCE = (GLOO, DEEPSPEED)  # need no MPI: measured in the first environment only
BUSY = " busy"  # ends the name of what was measured beside the neighbour


@dataclass(frozen=True, slots=True)
class Case:
    """One start of the ranks: all that they need to know."""

    place: Place
    sizes: tuple[str, ...]
    contenders: tuple[str, ...]
    parameters: int
    wire: str
    limits: SampleLimits
    mpi: str
    level: str


@dataclass(frozen=True, slots=True)
class Start:
    """What one start of the ranks measured: seconds by size and contender."""

    mpi: str
    level: str
    seconds: Figures


def bytes_of(size: str) -> int:
    """`"25MiB"` to 26214400."""
    return int(float(size[:-3]) * UNITS[size[-3:]])


# --- inside a rank ------------------------------------------------------------------------------------------------


def measure(case: Case) -> Figures:
    """Seconds by size and contender; collective over all ranks."""
    contenders = Contenders(MPI_NAMES[case.mpi], case.contenders, case.wire)
    with Neighbour(case.place.busy_neighbour and dist.get_rank() == 0) as neighbour:
        figures = {size: _measure_size(bytes_of(size) // 4, case, contenders, neighbour) for size in case.sizes}
    contenders.close()
    return figures


def _measure_size(elements: int, case: Case, contenders: Contenders, neighbour: Neighbour) -> dict[str, float]:
    source = 1e-3 * torch.randn(elements, generator=torch.Generator().manual_seed(dist.get_rank()))
    bucket = source.clone()  # peers' sums may grow until they are infinite, which changes no time
    lengths = [len(part) for part in torch.arange(elements).tensor_split(case.parameters)] if case.parameters else []
    state = BucketState.of(lengths) if lengths else None
    calls = contenders.on(bucket, source, state)
    quiet = {name: (call, neighbour.rest) for name, call in calls.items()}
    busy = {name + BUSY: (call, neighbour.work) for name, call in calls.items()} if case.place.busy_neighbour else {}
    return slowest_of_ranks(medians_within(case.limits, quiet | busy, lambda: bucket.copy_(source)))


# --- the tables ---------------------------------------------------------------------------------------------------


def figure(starts: Iterable[Start], size: str, name: str) -> float | None:
    """Median over the starts of a contender's seconds; of its best level where it is an MPI. None without any."""
    return _best_level([(start.level, start.seconds[size][name]) for start in starts if name in start.seconds[size]])


def ratio(starts: Iterable[Start], size: str, name: str, base: str) -> float | None:
    """Median over the starts of name / base, each within one start; of the best level. None without any."""
    seconds = [(start.level, start.seconds[size]) for start in starts]
    return _best_level([(level, row[name] / row[base]) for level, row in seconds if name in row and base in row])


def _best_level(values: Sequence[tuple[str, float]]) -> float | None:
    by_level = [[value for level, value in values if level == each] for each in {level for level, _ in values}]
    return min((statistics.median(each) for each in by_level), default=None)


def verdict(starts: Sequence[Start], size: str, ending: str = "") -> str:
    """The best peer / ours, and which peer that is."""
    peers = [name for name in CONTENDERS if name not in FLOORS and name not in TRANSPORTS]
    found = {name: r for name in peers if (r := ratio(starts, size, name + ending, "ours" + ending)) is not None}
    if not found:
        return ""
    best = min(found, key=lambda name: found[name])
    return f"{found[best]:.2f} ({best})"


def show(starts: Sequence[Start], place: Place) -> str:
    """The table of one case."""
    sizes = list(starts[0].seconds)
    names = [name for name in CONTENDERS if any(name in start.seconds[sizes[0]] for start in starts)]
    if place.busy_neighbour:
        header = ["bytes", *(f"{name}: quiet, busy" for name in names), "best peer / ours, busy"]
        rows = [[s, *(_quiet_and_busy(starts, s, name) for name in names), verdict(starts, s, BUSY)] for s in sizes]
    else:
        compared = [name for name in TRANSPORTS if name in names and IN_PLACE in names]
        header = ["bytes", *names, *(f"{name} / in place" for name in compared), "best peer / ours", "drift"]
        rows = [
            [
                size,
                *(_milliseconds(figure(starts, size, name)) for name in names),
                *(_number(ratio(starts, size, name, IN_PLACE)) for name in compared),
                verdict(starts, size),
                _drift(starts, size),
            ]
            for size in sizes
        ]
    return f"All-reduce, {place.text()}, float32, ms ({machine()})\n\n{table(header, rows)}"


def _quiet_and_busy(starts: Sequence[Start], size: str, name: str) -> str:
    quiet, busy = figure(starts, size, name), figure(starts, size, name + BUSY)
    grown = ratio(starts, size, name + BUSY, name)
    return f"{_milliseconds(quiet)}, {_milliseconds(busy)} (x {grown:.1f})" if grown is not None else ""


def _drift(starts: Sequence[Start], size: str) -> str:
    floor = [start.seconds[size][IN_PLACE] for start in starts if IN_PLACE in start.seconds[size]]
    return f"{max(floor) / min(floor):.2f}" if len(floor) > 1 else ""


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# --- the command --------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help=f"of {', '.join(SIZES)}, or any number of KiB or MiB")
    parser.add_argument("--only", nargs="+", default=CONTENDERS, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--mpi", nargs="+", default=tuple(MPI_NAMES), choices=MPI_NAMES)
    parser.add_argument("--levels", nargs="+", default=LEVELS, choices=("single", "funneled", "serialized", "multiple"))
    parser.add_argument("--starts", type=int, default=1, help="of every MPI at every level")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each contender and size")
    parser.add_argument("--parameters", type=int, default=0, help="of which ours gives the norms, too")
    parser.add_argument("--wire", default="gradient", help="of ours: gradient, bfloat16, float16 or int8")
    parser.add_argument("--placement", choices=("pinned", "unpinned"))
    parser.add_argument("--busy-neighbour", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    return parser.parse_args(arguments)


def cases(arguments: argparse.Namespace, place: Place, found: Mapping[str, Environment]) -> list[Case]:
    """The starts of one table in their order: the MPIs by turns at each level, then all over again."""
    limits = SampleLimits.of(place, arguments.seconds)
    made: list[Case] = []
    for level in [level for _ in range(arguments.starts) for level in arguments.levels]:
        for mpi in found:
            wanted = tuple(name for name in arguments.only if mpi == next(iter(found)) or name not in ONCE)
            made.append(
                Case(place, tuple(arguments.sizes), wanted, arguments.parameters, arguments.wire, limits, mpi, level)
            )
    return made


def main() -> int:
    if (text := inside_case()) is not None:
        case = TypeAdapter(Case).validate_json(text)
        with rank_group(case.place, case.level) as write:
            write(measure(case))
        return 0
    arguments = parse()
    found = environments(arguments.mpi)
    results: list[dict[str, Any]] = []
    for ranks in arguments.ranks:
        place = Place.of(ranks, arguments.placement, arguments.busy_neighbour)
        starts = [
            Start(case.mpi, case.level, start_case(found[case.mpi], ranks, json.dumps(asdict(case))))
            for case in cases(arguments, place, found)
        ]
        results.append({"place": asdict(place), "starts": [asdict(start) for start in starts]})
        print(f"{show(starts, place)}\n", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine(), "cases": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
