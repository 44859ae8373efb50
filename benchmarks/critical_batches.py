"""What the noise scale predicted, and what runs measured: one row for each finished search and target.

    python -m ddp critical-batch examples/critical_batch_digits.toml      # and the others, see `make sweeps`
    python benchmarks/critical_batches.py sweeps/*

Measured is B_crit = E_min/S_min with its bootstrap interval; predicted is Bbar, the noise scale averaged on the way
to the target: the median over batch sizes, and the smallest and largest. Where the runs do not bracket a value the
reason stands in its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ddp.noise.estimate import Estimate
from ddp.search.findings import Finding, read_findings
from harness import table

HEADER = (
    "search",
    "loss",
    "S_min",
    "measured B_crit",
    "exponent",
    "predicted, plain",
    "predicted, Adam's metric",
    "runs",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="SWEEP_DIR")
    directories: list[Path] = parser.parse_args().directories
    print(table(HEADER, [row(directory.name, finding) for directory in directories for finding in found(directory)]))


def found(directory: Path) -> list[Finding]:
    return [finding for finding in read_findings(directory) if finding.method == "sweep"]


def row(name: str, finding: Finding) -> tuple[str, ...]:
    fit = finding.fit
    return (
        name,
        f"{finding.target:.3g}",
        interval(fit.smallest_steps),
        interval(fit.critical_batch_size) if fit.critical_batch_size else f"none: {fit.reason}",
        interval(fit.exponent),
        interval(finding.predicted_plain),
        interval(finding.predicted_preconditioned),
        str(finding.runs),
    )


def interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


if __name__ == "__main__":
    main()
