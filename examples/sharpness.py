"""SGD against SAM: the loss around what each of them found, drawn side by side on one scale.

python examples/sharpness.py --directory runs/sharpness --page sharpness.html
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).with_name("sharpness.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.2, help="how far uphill SAM looks")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--directory", type=Path, default=Path("runs/sharpness"), help="for the runs; a new one")
    parser.add_argument("--page", type=Path, default=Path("sharpness.html"))
    arguments = parser.parse_args()
    length = ["--set", f"run.epochs={arguments.epochs}", "--set", f"run.directory={arguments.directory}"]
    _ddp("train", str(JOB), *length, "--set", "run.id=sgd")
    _ddp("train", str(JOB), *length, "--set", "run.id=sam", "--set", f"optimizer.sam_rho={arguments.rho}")
    runs = [str(arguments.directory / name) for name in ("sgd", "sam")]
    _ddp("landscape", *runs, "--points", str(arguments.points), "--page", str(arguments.page))


def _ddp(*arguments: str) -> None:
    print("\n$ python -m ddp", shlex.join(arguments), flush=True)
    if code := subprocess.run([sys.executable, "-m", "ddp", *arguments], check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
