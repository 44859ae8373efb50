"""Hostile inputs for every reader of files, names and environments, for as long as it is told to.

    python benchmarks/fuzz.py [--seconds 30] [--seed 0] [--reader "job file"]

Each reader gets so many seconds. Prints how many inputs each has had, and stops at the first that got further than an error
of ours, with the input. The inputs and what is demanded are the tests' (`tests/hostile_inputs.py`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hostile_inputs import READERS, Reader

NOT_CHECKED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

AT_ONCE = 500  # inputs of one seed


def fuzz(reader: Reader, seconds: float, first_seed: int) -> int:
    """How many inputs were tried."""
    tried, number, end = 0, first_seed, time.monotonic() + seconds
    while time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=AT_ONCE,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=NOT_CHECKED,
        )
        @given(reader.inputs)
        def attempt(value: Any) -> None:
            nonlocal tried
            if time.monotonic() < end:
                tried += 1
                with tempfile.TemporaryDirectory() as folder:
                    reader.check(Path(folder), value)

        attempt()
        number += 1
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=[reader.name for reader in READERS])
    given_arguments = parser.parse_args()
    for reader in READERS:
        if given_arguments.reader in (None, reader.name):
            tried = fuzz(reader, given_arguments.seconds, given_arguments.seed)
            print(f"{reader.name:12} {tried:9,} inputs, none got further than an error", flush=True)


if __name__ == "__main__":
    main()
