"""The torchrun command for one node. torchrun is `torch.distributed.run` of the interpreter that is given."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence

# torchrun passes SIGTERM on to the ranks, which then have 30 s to save; of SIGUSR1 and 2 it dies and orphans them.
SIGNALS: Mapping[int, int] = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def render(worker: Sequence[str], *, ranks: int, port: int, interpreter: str, max_restarts: int = 0) -> list[str]:
    """The argv that runs `interpreter *worker` as `ranks` ranks which meet on 127.0.0.1:`port`."""
    restarts = [f"--max-restarts={max_restarts}"] if max_restarts else []
    return [
        interpreter,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        *restarts,
        "--no-python",
        interpreter,
        *worker,
    ]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun needs on top of `environ`: it sets OMP_NUM_THREADS=1 anyway, with a warning where it is unset."""
    return {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": "1"}
