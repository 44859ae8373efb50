"""What an all-reduce costs at any size: an alpha-beta model fitted to this machine, its error, and its projection.

    python benchmarks/scaling_model.py [--quick] [--points FILE] [--save-points FILE] [--mebibytes 100]
                                       [--ranks-per-node 8] [--gbits 10 25 100 400] [--chart scaling.svg]

Measures (scaling_points.py) shared memory with 2, 3 and 4 ranks, and two and four nodes behind links of several
rates, which needs root; or takes the points of an earlier run. The coefficients are fitted by least squares on
relative errors and kept at or above zero:

    inside a node   t = c + a o + B o (k1 + k2 (r - 1) / r)                  r ranks, B bytes
    between nodes   t = the longer of what the link and what the cores need
                        b (bytes of a node) / rate   and   c + a o messages + g o (bytes of a rank)
    ours            the same, the cores' part with that inside the node on top

o is the number of ranks that share a core (1 where each has its own, and in the projection); messages and bytes
follow from the algorithm (`traffic`). Some sizes and one rate are held out of the fit, and the error on them is
what is to be expected. The projection takes this machine's coefficients, TCP through virtual devices included, to
nodes with a core a rank on faster links: it says what shape to expect, not what a certain cluster will do.

Measuring the noise scale adds a row of a fixed number of bytes a rank and step, whatever the model's size; the
squared norms are summed on the way and add none.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ddp.transport.row import ROW_LENGTH
from harness import machine, table

Algorithm = Literal["inside", "ours", "ring"]
MEBIBYTE = 1 << 20
ROW_BYTES = 8 * ROW_LENGTH
LARGEST_RANKS = 16_384
_MOST_SORTINGS = 50


@dataclass(frozen=True, slots=True)
class Setting:
    """One all-reduce of `size_bytes`; `cores` are those that all ranks share, `bits_per_second` each node's link."""

    algorithm: Algorithm
    size_bytes: int
    nodes: int
    ranks_per_node: int
    cores: int
    bits_per_second: float = math.inf

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def ranks_per_core(self) -> float:
        return max(1.0, self.ranks / self.cores)


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured: median seconds of the slowest rank."""

    setting: Setting
    seconds: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends, and what leaves its node."""

    messages: float
    rank_bytes: float
    node_bytes: float


def traffic(setting: Setting) -> Traffic:
    """Between nodes: ours sends each rank's slice directly between nodes, a ring passes everything along all ranks."""
    nodes, ranks, size = setting.nodes, setting.ranks, setting.size_bytes
    if setting.algorithm == "ring":
        share = 2 * (ranks - 1) / ranks * size
        return Traffic(2 * (ranks - 1), share, share if nodes > 1 else 0.0)
    share = 2 * (nodes - 1) / nodes * size
    return Traffic(2 * (nodes - 1), share / setting.ranks_per_node, share)


def inside_terms(setting: Setting) -> list[float]:
    shared, ranks = setting.ranks_per_core, setting.ranks_per_node
    work = setting.size_bytes * shared
    return [1.0, shared, work, work * (ranks - 1) / ranks]


def link_seconds(setting: Setting) -> float:
    """What a link that loses nothing needs."""
    return 8 * traffic(setting).node_bytes / setting.bits_per_second


def between_terms(setting: Setting) -> list[float]:
    """What the cores do for the messages."""
    sent, shared = traffic(setting), setting.ranks_per_core
    return [1.0, shared * sent.messages, shared * sent.rank_bytes]


@dataclass(frozen=True, slots=True)
class Between:
    """Coefficients of what happens between nodes: of the link's seconds, and of the terms above."""

    link: float
    cores: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Model:
    """All that is fitted."""

    inside: NDArray[np.float64]
    ours: Between
    ring: Between

    def seconds(self, setting: Setting) -> float:
        return max(self._link_seconds(setting), self._core_seconds(setting))

    def _between(self, setting: Setting) -> Between | None:
        if setting.algorithm == "ring":
            return self.ring
        return self.ours if setting.nodes > 1 else None

    def _link_seconds(self, setting: Setting) -> float:
        between = self._between(setting)
        return 0.0 if between is None else between.link * link_seconds(setting)

    def _core_seconds(self, setting: Setting) -> float:
        between, seconds = self._between(setting), self.inside_seconds(setting)
        return seconds if between is None else seconds + float(between.cores @ between_terms(setting))

    def inside_seconds(self, setting: Setting) -> float:
        is_shared = setting.algorithm != "ring" and setting.ranks_per_node > 1
        return float(self.inside @ inside_terms(setting)) if is_shared else 0.0


def fit(points: Sequence[Point]) -> Model:
    """Least squares on relative errors; ours between nodes on what the fitted inside leaves."""
    of = {name: [point for point in points if point.setting.algorithm == name] for name in ("inside", "ours", "ring")}
    inside = _solve([inside_terms(point.setting) for point in of["inside"]], of["inside"])
    unknown = Between(0.0, np.zeros(3))
    known = Model(inside, unknown, unknown).inside_seconds
    return Model(inside, _fit_between(of["ours"], known), _fit_between(of["ring"], known))


def _fit_between(points: Sequence[Point], known: Callable[[Setting], float]) -> Between:
    """Points are sorted into those of the link and those of the cores until that agrees with what it gives."""
    found, of_link = Between(1.0, np.zeros(3)), [link_seconds(p.setting) > 0.7 * p.seconds for p in points]
    for _ in range(_MOST_SORTINGS):
        by_link = [point for point, is_of_link in zip(points, of_link, strict=True) if is_of_link]
        by_cores = [point for point, is_of_link in zip(points, of_link, strict=True) if not is_of_link]
        link = _solve([[link_seconds(point.setting)] for point in by_link], by_link)
        cores = _solve([between_terms(point.setting) for point in by_cores], by_cores, known)
        found = Between(float(link[0]) if by_link else 1.0, cores if by_cores else np.zeros(3))
        before, of_link = (
            of_link,
            [
                found.link * link_seconds(each.setting)
                >= known(each.setting) + float(found.cores @ between_terms(each.setting))
                for each in points
            ],
        )
        if of_link == before:
            break
    return found


def _solve(
    terms: Sequence[Sequence[float]], points: Sequence[Point], known: Callable[[Setting], float] = lambda setting: 0.0
) -> NDArray[np.float64]:
    if not points:
        return np.zeros(4)
    seconds = np.array([point.seconds for point in points])
    left = seconds - np.array([known(point.setting) for point in points])
    matrix = np.array(terms) / seconds[:, None]
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    return nnls(matrix / scale, left / seconds)[0] / scale


def split(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Points to fit and points held out: every other size between the smallest and the largest, and the middle rate."""
    sizes = {
        name: sorted({p.setting.size_bytes for p in points if p.setting.algorithm == name}) for name in _names(points)
    }
    rates = sorted({point.setting.bits_per_second for point in points if point.setting.nodes > 1})
    middle_rate = rates[len(rates) // 2] if len(rates) > 2 else None

    def is_held_out(point: Point) -> bool:
        setting = point.setting
        return setting.size_bytes in sizes[setting.algorithm][1:-1:2] or setting.bits_per_second == middle_rate

    return [p for p in points if not is_held_out(p)], [p for p in points if is_held_out(p)]


def _names(points: Sequence[Point]) -> list[Algorithm]:
    return sorted({point.setting.algorithm for point in points})


def relative_errors(model: Model, points: Sequence[Point]) -> list[float]:
    return [abs(model.seconds(point.setting) / point.seconds - 1) for point in points]


def projection(
    model: Model, size_bytes: int, ranks_per_node: int, gigabits: Sequence[float]
) -> dict[float, list[tuple[int, float, float]]]:
    """By link: (ranks, seconds of ours, seconds of a flat ring), from one node up; a core a rank."""
    counts = [ranks_per_node * 2**power for power in range(int(math.log2(LARGEST_RANKS // ranks_per_node)) + 1)]

    def seconds(algorithm: Algorithm, ranks: int, rate: float) -> float:
        nodes = ranks // ranks_per_node
        return model.seconds(Setting(algorithm, size_bytes, nodes, ranks_per_node, cores=ranks, bits_per_second=rate))

    return {
        each: [(n, seconds("ours", n, 1e9 * each), seconds("ring", n, 1e9 * each)) for n in counts] for each in gigabits
    }


# --- what is printed and drawn --------------------------------------------------------------------------------------


def error_table(model: Model, fitted: Sequence[Point], held_out: Sequence[Point]) -> str:
    rows = []
    for name in _names(fitted):
        for label, points in (("fitted", fitted), ("held out", held_out)):
            if errors := relative_errors(model, [point for point in points if point.setting.algorithm == name]):
                cells = f"{100 * statistics.median(errors):.0f} %", f"{100 * max(errors):.0f} %"
                rows.append([name, label, str(len(errors)), *cells])
    return table(["all-reduce", "points", "number", "median error", "worst"], rows)


def coefficient_table(model: Model) -> str:
    inside = ["inside", "", *_amounts(model.inside, ("us", "us a rank on a core", "ns/KiB", "ns/KiB (r-1)/r"))]
    rows = [inside]
    for name, between in (("ours", model.ours), ("ring", model.ring)):
        cores = _amounts(between.cores, ("us", "us a message", "ns/KiB"))
        rows.append([name, f"{between.link:.3g} x bytes/rate", *cores, ""])
    return table(["all-reduce", "link", "constant", "each", "size", ""], rows)


def _amounts(coefficients: NDArray[np.float64], labels: Sequence[str]) -> list[str]:
    scales = {"us": 1e6, "ns": 1e9 * 1024}
    return [f"{scales[label[:2]] * value:.3g} {label}" for value, label in zip(coefficients, labels, strict=True)]


def projection_table(rows: dict[float, list[tuple[int, float, float]]]) -> str:
    counts = [count for count, _, _ in next(iter(rows.values()))]
    header = ["ranks", *(f"{gigabits:g} Gbit/s: ours / ring, ms" for gigabits in rows)]
    cells = [
        [f"{count:,}", *(f"{1e3 * rows[link][i][1]:.3g} / {1e3 * rows[link][i][2]:.3g}" for link in rows)]
        for i, count in enumerate(counts)
    ]
    return table(header, cells)


def draw(rows: dict[float, list[tuple[int, float, float]]], title: str, file: Path) -> None:
    """Ours solid, the ring dashed, a colour a link."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, (gigabits, points) in enumerate(rows.items()):
        ranks = [count for count, _, _ in points]
        axes.plot(ranks, [1e3 * ours for _, ours, _ in points], color=f"C{index}", label=f"ours, {gigabits:g} Gbit/s")
        axes.plot(ranks, [1e3 * ring for _, _, ring in points], color=f"C{index}", linestyle="--", label="flat ring")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="all-reduce, ms", title=title)
    axes.set_xscale("log", base=2)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(file)
    pyplot.close(figure)


def main() -> int:
    arguments = _arguments()
    points = load(arguments.points) if arguments.points else _measured(quick=arguments.quick)
    if arguments.save_points:
        arguments.save_points.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    fitted, held_out = split(points)
    model = fit(fitted)
    rows = projection(model, arguments.mebibytes * MEBIBYTE, arguments.ranks_per_node, arguments.gbits)
    title = f"All-reduce of {arguments.mebibytes} MiB, {arguments.ranks_per_node} ranks a node, projected"
    noise = f"The noise scale's row: {ROW_BYTES} bytes a rank and step, whatever the size of the model."
    parts = [f"Fitted to {machine()}", coefficient_table(model), error_table(model, fitted, held_out)]
    print("\n\n".join([*parts, title, projection_table(rows), noise]))
    if arguments.chart:
        draw(rows, title, arguments.chart)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points, in about a minute")
    parser.add_argument("--points", type=Path, metavar="FILE", help="points that --save-points wrote, nothing measured")
    parser.add_argument("--save-points", type=Path, metavar="FILE")
    parser.add_argument("--mebibytes", type=int, default=100, help="of gradients, in the projection")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="in the projection")
    parser.add_argument("--gbits", type=float, nargs="+", default=[10, 25, 100, 400], help="links of the projection")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="an SVG or PNG of the projection")
    return parser.parse_args()


def load(file: Path) -> list[Point]:
    return [Point(Setting(**each["setting"]), each["seconds"]) for each in json.loads(file.read_text())]


def _measured(*, quick: bool) -> list[Point]:
    from scaling_points import measure  # torch, mpi4py

    return measure(quick=quick)


if __name__ == "__main__":
    sys.exit(main())
