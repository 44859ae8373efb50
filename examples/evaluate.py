"""Evaluate every checkpoint of a run, from a script: a line each, the newest first.

    python examples/evaluate.py runs/digits-20250101-120000-ab12

One of them, from the command line and with any number of ranks:

    python -m ddp evaluate runs/digits-20250101-120000-ab12/checkpoints/step-00000120
    torchrun --nproc-per-node=4 -m ddp evaluate runs/digits-20250101-120000-ab12 --split validation --json
"""

from __future__ import annotations

import sys
from pathlib import Path

from ddp.checkpoint.names import candidates
from ddp.evaluate_command import evaluate_saved
from ddp.job import load_job
from ddp.topology import SINGLE_PROCESS, Topology


def lines(run_directory: Path, here: Topology = SINGLE_PROCESS) -> list[str]:
    """Step, loss and metrics on the validation set."""
    job = load_job(run_directory / "job.toml")
    found: list[str] = []
    for each in candidates(run_directory / "checkpoints"):
        record = evaluate_saved(each.path, job, here, splits=("validation",)).records[0]
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        found.append(f"step {record.step:6d}  loss {record.loss:.4f}  {metrics}")
    return found


if __name__ == "__main__":
    print(*lines(Path(sys.argv[1])), sep="\n")
