"""All-reduce of float32 gradients over two nodes on a 1 Gbit/s link: Gloo's flat ring, Open MPI, and ours.

    python benchmarks/nodes.py [--nodes 2] [--ranks-per-node 2] [--rate-mbit 1000] [--mebibytes 25 100]
                               [--rounds 5] [--json FILE]

Needs root: the nodes are namespaces of this machine (cluster.py), each link limited in both directions by
`tc tbf`. Ours includes both squared norms and the mean; the others only sum. All run in the same processes, in
turn; figures are medians of the slowest rank. "Of the rate" is bytes that left the busiest node, headers
included, over time and the link's rate. Loads all cores for some seconds a round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster import Cluster, refusal
from ddp.errors import UsageError
from ddp.process_group import initialise, shutdown
from ddp.topology import from_environment
from ddp.transport.base import Transport
from ddp.transport.select import select_transport
from harness import interleaved_medians, machine, slowest_of_ranks, table

INSIDE = "DDP_BENCHMARK_ON_NODE"
MEBIBYTE = 1 << 20
TIMEOUT_SECONDS = 300.0
GLOO, OPEN_MPI = "Gloo", "Open MPI"
OURS = {
    "hierarchical": ("hierarchical", "gradient"),
    "hierarchical, bfloat16": ("hierarchical", "bfloat16"),
    "hierarchical, int8": ("hierarchical", "int8"),
    "mpi": ("mpi", "gradient"),
}
Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Point:
    """One contender at one size: median seconds of a call, and bytes that left the busiest node in it."""

    mebibytes: int
    contender: str
    seconds: float
    bytes_sent: float

    def share_of(self, bits_per_second: float) -> float:
        return 8 * self.bytes_sent / self.seconds / bits_per_second


def link_bytes_sent() -> int:
    """Bytes that this node has sent since it was made."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.partition(":")[2].split()[8]) for line in lines if line.strip().startswith("eth0:"))


def start_on_nodes(arguments: argparse.Namespace) -> list[Point]:
    """Run this script again on every node, under Open MPI; what its rank 0 found.

    Raises:
        SystemExit: the ranks failed; their words are on stderr.
    """
    mpirun = str(Path(sysconfig.get_path("scripts")) / "mpirun")
    ranks = arguments.nodes * arguments.ranks_per_node
    variables = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with Cluster(arguments.nodes, f"{arguments.rate_mbit}mbit") as cluster:
        # Open MPI would spin although ranks outnumber the cores of a node, which has a share of this machine's.
        passed_on = ["-x", "OMP_NUM_THREADS", "-x", INSIDE, "-x", "OMPI_MCA_mpi_yield_when_idle=1"]
        options = [*cluster.mpirun_options("openmpi", arguments.ranks_per_node), *passed_on, "--bind-to", "none"]
        command = [mpirun, *options, "-n", str(ranks), sys.executable, *sys.argv]
        ended = cluster.head.run(command, Path.cwd(), variables | {INSIDE: "1"}, timeout=arguments.limit_seconds)
    if ended.returncode:
        print(ended.stdout, ended.stderr, sep="\n", file=sys.stderr)
        sys.exit(ended.returncode)
    *notes, points = ended.stdout.splitlines()
    print("\n".join(notes), end="\n" if notes else "")
    return [Point(**point) for point in json.loads(points)]


def measure(arguments: argparse.Namespace) -> list[Point]:
    """Collective over all ranks."""
    transports = _transports()
    points: list[Point] = []
    for mebibytes in arguments.mebibytes:
        elements = mebibytes * MEBIBYTE // 4
        contenders, prepare = _contenders(elements, transports)
        seconds = interleaved_medians(contenders, rounds=arguments.rounds, calls=1, prepare=prepare)
        slowest = slowest_of_ranks(seconds)
        sent = slowest_of_ranks({name: _bytes_of(call, prepare) for name, call in contenders.items()})
        points += [Point(mebibytes, name, slowest[name], sent[name]) for name in contenders]
    for transport in transports.values():
        transport.close()
    return points


def _transports() -> dict[str, Transport]:
    """Ours, as far as they can be had here; collective."""
    opened: dict[str, Transport] = {}
    for label, (name, wire) in OURS.items():
        try:
            opened[label] = select_transport(name, "cpu", TIMEOUT_SECONDS, wire=wire)
        except UsageError as error:
            if dist.get_rank() == 0:
                print(f"Without {label}: {error}.", flush=True)
    return opened


def _contenders(elements: int, transports: dict[str, Transport]) -> tuple[Contenders, Callable[[], None]]:
    from mpi4py import MPI

    # Peers' sums double with every call: small numbers keep them finite.
    source = 1e-3 * torch.randn(elements, generator=torch.Generator().manual_seed(dist.get_rank()))
    bucket = source.clone()
    array, weight = bucket.numpy(), 1.0 / dist.get_world_size()

    def prepare() -> None:
        bucket.copy_(source)
        MPI.COMM_WORLD.Barrier()

    def ours(transport: Transport) -> Callable[[], object]:
        def call() -> None:
            transport.all_reduce_mean_(bucket, weight)
            transport.complete()

        return call

    contenders: dict[str, Any] = {
        GLOO: lambda: dist.all_reduce(bucket),
        OPEN_MPI: lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array),
    }
    return contenders | {label: ours(transport) for label, transport in transports.items()}, prepare


def _bytes_of(call: Callable[[], object], prepare: Callable[[], None]) -> float:
    """What this node sends in one call."""
    prepare()
    before = link_bytes_sent()
    prepare()
    call()
    prepare()
    return float(link_bytes_sent() - before)


def show(points: list[Point], arguments: argparse.Namespace) -> str:
    rate = 1e6 * arguments.rate_mbit
    gloo = {point.mebibytes: point.seconds for point in points if point.contender == GLOO}
    header = ["MiB", "contender", "ms", "Gloo / it", "MiB sent by a node", "of the rate"]
    rows = [
        [
            str(point.mebibytes),
            point.contender,
            f"{1e3 * point.seconds:.4g}",
            f"{gloo[point.mebibytes] / point.seconds:.2f}",
            f"{point.bytes_sent / MEBIBYTE:.4g}",
            f"{100 * point.share_of(rate):.1f} %",
        ]
        for point in points
    ]
    title = f"{arguments.nodes} nodes x {arguments.ranks_per_node} ranks, {arguments.rate_mbit} Mbit/s, float32"
    return f"All-reduce, {title} ({machine()})\n\n{table(header, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--rate-mbit", type=int, default=1000, help="of each link, in each direction")
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-seconds", type=float, default=900.0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if INSIDE in os.environ:
        return run_as_rank(arguments)
    if (reason := refusal()) is not None:
        print(f"benchmarks/nodes.py: {reason}", file=sys.stderr)
        return 2
    points = start_on_nodes(arguments)
    print(show(points, arguments), flush=True)
    if arguments.json:
        figures = {"machine": machine(), **vars(arguments), "points": [asdict(point) for point in points]}
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Rank 0 prints the points as one line of JSON."""
    topology = from_environment(os.environ)
    torch.set_num_threads(1)
    initialise(topology, "cpu", TIMEOUT_SECONDS)
    points = measure(arguments)
    if topology.rank == 0:
        print(json.dumps([asdict(point) for point in points]), flush=True)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
