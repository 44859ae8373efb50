"""What a rank runs to count bytes: a few all-reduces by each transport of the command line, and one line of JSON.

Arguments are NAME:WIRE. Rank 0 prints {argument: refusal, or [name, [bytes its node sent, bytes it counted] a rank]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ddp.topology import from_environment

ELEMENTS, CALLS = 2_000_003, 3


def link_bytes_sent() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("eth0:")]
    return int(line.partition(":")[2].split()[8])


def count(name: str, wire: str) -> str | list[object]:
    """Collective over the default group."""
    import torch
    import torch.distributed as dist

    from ddp.errors import UsageError
    from ddp.transport.select import select_transport

    try:
        transport = select_transport(name, "cpu", 60.0, wire=wire)
    except UsageError as refusal:
        return str(refusal)
    weight, bucket = 1.0 / transport.world_size, torch.randn(ELEMENTS)
    before = _counters(transport)
    for _ in range(CALLS):
        transport.all_reduce_mean_(bucket, weight)
        transport.complete()
    mine = torch.tensor([after - start for after, start in zip(_counters(transport), before, strict=True)])
    everyone = [torch.zeros_like(mine) for _ in range(transport.world_size)]
    dist.all_gather(everyone, mine)
    transport.close()
    return [transport.name, *(each.tolist() for each in everyone)]


def _counters(transport: object) -> tuple[int, int]:
    """While no rank sends; c10d does not count."""
    import torch.distributed as dist

    dist.barrier()
    counters = link_bytes_sent(), getattr(transport, "wire_bytes_total", 0)
    dist.barrier()
    return counters


if __name__ == "__main__":
    here = from_environment(os.environ)  # before anything imports mpi4py
    from ddp.process_group import initialise, shutdown

    initialise(here, "cpu", 60.0)
    counted = {argument: count(*argument.split(":")) for argument in sys.argv[1:]}
    if here.rank == 0:
        print(json.dumps(counted), flush=True)
    shutdown()
