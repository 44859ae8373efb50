"""What can befall a run, injected for real: the table of the README.

    python benchmarks/soak.py [ROW ...] [--cases N] [--seed S] [--keep FOLDER]

A row is named by its word (`--list` shows them). Without `--cases` each has its full count. What a failing case came to
is printed as soon as it ends, and its folder stays.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.rows import ROWS
from faults.running import end_in_order
from faults.verdict import Row, Verdict


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: how its cases ended. `hindrance`: why there are none."""

    row: Row
    verdicts: Sequence[Verdict]
    hindrance: str | None = None

    def text(self) -> str:
        passed = [verdict for verdict in self.verdicts if verdict.ok]
        slowest = max((verdict.seconds for verdict in passed), default=0.0)
        shown = f"{slowest:.1f} s" if slowest else ""  # not every row waits for something
        note = f"not run: {self.hindrance}" if self.hindrance else self.row.promise
        return f"| {self.row.fault} | {len(self.verdicts)} | {len(passed)} | {shown} | {note} |"


def main() -> int:
    arguments = _parser().parse_args()
    end_in_order()
    if arguments.list:
        print(*(f"{row.name:12} {row.soak_cases:4}  {row.fault}" for row in ROWS), sep="\n")
        return 0
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="soak-"))
    rows = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
    lines = [_soak(row, arguments.seed, arguments.cases or row.soak_cases, folder / row.name) for row in rows]
    print("\n| fault | cases | passed | slowest | what happens |\n|---|---|---|---|---|")
    print(*(line.text() for line in lines), sep="\n")
    is_whole = all(verdict.ok for line in lines for verdict in line.verdicts)
    if is_whole and not arguments.keep:
        shutil.rmtree(folder)
    return 0 if is_whole else 1


def _soak(row: Row, seed: int, count: int, folder: Path) -> Line:
    hindrance = row.hindrance()
    if hindrance is not None:
        return Line(row, (), hindrance)
    verdicts: list[Verdict] = []
    for index, case in enumerate(row.cases(seed, count)):
        began = time.monotonic()
        place = folder / f"case-{index}"
        verdicts.append(row.run(case, place))
        verdict = verdicts[-1]
        word = "ok" if verdict.ok else "FAILED"
        print(f"{row.name} {index + 1}/{count} {word} ({time.monotonic() - began:.1f} s)  {verdict.what}", flush=True)
        if verdict.ok:
            shutil.rmtree(place)
    return Line(row, verdicts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[[], *(row.name for row in ROWS)])
    parser.add_argument("--cases", type=int, help="of each row, in place of its full count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="where the cases run; kept afterwards")
    parser.add_argument("--list", action="store_true", help="show the rows and their full counts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
