"""Seeds of one job as an ensemble, one network that learns from all of them, and the snapshots of one run as one network.

python examples/ensemble.py --seeds 3 --directory runs/ensemble

All in one go on ranks: start each of the commands that it prints with torchrun instead of python.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).with_name("ensemble.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--directory", type=Path, default=Path("runs/ensemble"), help="for the runs; a new one")
    arguments = parser.parse_args()
    length = ["--set", f"run.epochs={arguments.epochs}", "--set", f"run.directory={arguments.directory}"]
    members = [f"seed-{seed}" for seed in range(1, arguments.seeds + 1)]
    for seed, name in enumerate(members, 1):
        _ddp("train", str(JOB), *length, "--set", f"run.seed={seed}", "--set", f"run.id={name}")
    runs = [str(arguments.directory / name) for name in members]
    _ddp("ensemble", *runs, "--distil", str(JOB), *length, "--set", "run.id=student", "--set", "run.seed=99")
    _ddp("ensemble", "--snapshots", runs[0], "--average-weights")
    _ddp("ensemble", *runs, "--averaged")


def _ddp(*arguments: str) -> None:
    print("\n$ python -m ddp", shlex.join(arguments), flush=True)
    if code := subprocess.run([sys.executable, "-m", "ddp", *arguments], check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
