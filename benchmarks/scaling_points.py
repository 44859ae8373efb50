"""The measured points of scaling_model.py: this script runs itself as ranks, on this machine and on its nodes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from cluster import Cluster, refusal
from ddp.process_group import initialise, shutdown
from ddp.topology import Topology, from_environment
from ddp.transport.base import Transport
from ddp.transport.hierarchical import HierarchicalTransport
from ddp.transport.select import select_transport
from scaling_model import MEBIBYTE, Algorithm, Point, Setting

INSIDE = "DDP_SCALING_POINTS"  # JSON: what the ranks are to measure
FASTEST_MBIT = 4000
TIMEOUT_SECONDS = 120.0
START_SECONDS = 600.0
MPIRUN = str(Path(sysconfig.get_path("scripts")) / "mpirun")
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def measure(*, quick: bool) -> list[Point]:
    """Shared memory with 2 to 4 ranks; then two nodes of one and two ranks and four of one, where nodes can be had."""
    sizes = [1 << 16, 1 << 18, MEBIBYTE, 4 * MEBIBYTE, 25 * MEBIBYTE] + ([] if quick else [100 * MEBIBYTE])
    points = [point for ranks in (2, 3, 4) for point in _on_this_machine(ranks, sizes, rounds=5 if quick else 21)]
    if (reason := refusal()) is not None:
        print(f"nothing was measured between nodes: {reason}", file=sys.stderr)
        return points
    sizes = [1 << 16, 1 << 18, MEBIBYTE, 4 * MEBIBYTE] + ([] if quick else [16 * MEBIBYTE])
    rates = [200, 1000, FASTEST_MBIT]
    for nodes, ranks_per_node in ((2, 1), (2, 2), (4, 1)):  # several numbers of ranks, or a ring's terms run together
        points += _on_nodes(nodes, ranks_per_node, sizes, rates, rounds=3 if quick else 7)
    return points


def _on_this_machine(ranks: int, sizes: Sequence[int], rounds: int) -> list[Point]:
    asked = {"algorithms": ["inside"], "nodes": 1, "sizes": list(sizes), "rates": [], "rounds": rounds}
    options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks)]
    environment = {**os.environ, **VARIABLES, INSIDE: json.dumps(asked)}
    argv = [MPIRUN, *options, sys.executable, __file__]
    ended = subprocess.run(
        argv,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=START_SECONDS,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return _points(ended.stdout)


def _on_nodes(nodes: int, ranks_per_node: int, sizes: Sequence[int], rates: Sequence[int], rounds: int) -> list[Point]:
    asked = {
        "algorithms": ["ours", "ring"],
        "nodes": nodes,
        "sizes": list(sizes),
        "rates": list(rates),
        "rounds": rounds,
    }
    passed_on = [option for name in (*VARIABLES, INSIDE) for option in ("-x", name)]
    with Cluster(nodes, f"{max(rates)}mbit") as cluster:
        options = [*cluster.mpirun_options("openmpi", ranks_per_node), *passed_on, "--bind-to", "none"]
        command = [MPIRUN, *options, "-n", str(nodes * ranks_per_node), sys.executable, __file__]
        environment = VARIABLES | {INSIDE: json.dumps(asked)}
        ended = cluster.head.run(command, Path.cwd(), environment, timeout=START_SECONDS)
    if ended.returncode:
        raise RuntimeError(f"the ranks on {nodes} nodes failed:\n{ended.stdout}\n{ended.stderr}")
    return _points(ended.stdout)


def _points(text: str) -> list[Point]:
    return [Point(Setting(**each["setting"]), each["seconds"]) for each in json.loads(text.splitlines()[-1])]


# --- as a rank ----------------------------------------------------------------------------------------------------


def run_as_rank() -> None:
    """Measure what is asked; rank 0 prints the points as one line of JSON."""
    here, asked = from_environment(os.environ), json.loads(os.environ[INSIDE])
    torch.set_num_threads(1)
    initialise(here, "cpu", TIMEOUT_SECONDS)
    calls = {name: _call_of(name, here) for name in asked["algorithms"]}
    points: list[Point] = []
    for rate in asked["rates"] or [None]:
        if rate is not None:
            _limit_link(here, rate)
        for size in asked["sizes"]:
            for name, call in calls.items():
                setting = _setting(name, size, asked["nodes"], here, rate)
                points.append(Point(setting, _seconds(call, size, asked["rounds"])))
    if here.rank == 0:
        print(json.dumps([asdict(point) for point in points]), flush=True)
    shutdown()


def _setting(name: Algorithm, size: int, nodes: int, here: Topology, rate: int | None) -> Setting:
    bits_per_second = 1e6 * rate if rate is not None else float("inf")
    return Setting(name, size, nodes, here.world_size // nodes, os.cpu_count() or 1, bits_per_second)


def _call_of(name: Algorithm, here: Topology) -> Callable[[torch.Tensor], object]:
    if name == "ring":
        return dist.all_reduce
    transport: Transport
    if name == "inside":
        transport = select_transport("shared_memory", "cpu", TIMEOUT_SECONDS)
    else:  # with one rank a node, too, which the choice by name refuses: one model is fitted to all
        transport = HierarchicalTransport(None, TIMEOUT_SECONDS)
    weight = 1.0 / here.world_size

    def ours(bucket: torch.Tensor) -> None:
        transport.all_reduce_mean_(bucket, weight)
        transport.complete()

    return ours


def _limit_link(here: Topology, rate_mbit: int) -> None:
    """What leaves this node, from now on; the switch's ports stay at the fastest rate."""
    if here.local_rank == 0:
        limit = f"tc qdisc replace dev eth0 root tbf rate {rate_mbit}mbit burst 128kb latency 20ms"
        subprocess.run(limit.split(), check=True, timeout=10)
    dist.barrier()


def _seconds(call: Callable[[torch.Tensor], object], size_bytes: int, rounds: int) -> float:
    """Median of a call, of the slowest rank; small ones in a row, long enough that what a link lets burst is little."""
    bucket, calls = torch.zeros(size_bytes // 4), max(1, 4 * MEBIBYTE // size_bytes)
    samples: list[float] = []
    for _ in range(rounds + 1):  # the first is for warming up
        dist.barrier()
        began = time.perf_counter()
        for _ in range(calls):
            call(bucket)
        samples.append((time.perf_counter() - began) / calls)
    median = torch.tensor([statistics.median(samples[1:])], dtype=torch.float64)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return float(median)


if __name__ == "__main__":
    run_as_rank()
