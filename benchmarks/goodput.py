"""How much of a run's time goes into steps that count, when its ranks are killed at random; and what a save costs.

    python benchmarks/goodput.py [--ranks 2 4] [--mean-seconds 4] [--epochs 160] [--seed 0]

A real run, restarted by torchrun, is killed (SIGKILL to a random rank) after exponential times with the mean
`--mean-seconds`: far more often than any machine fails, so that the benchmark takes minutes. Measured are start, restart
(from the kill to the next step that counts), steps lost and the effective training time ratio; and that in every
epoch each example was used exactly once, of each step the last time that it was taken. The ratios at a mean time
between failures of 60 s to 10 min are computed from those parts (Poisson failures, saves at the interval given), and so is
the one at the run's own mean, to be held against the measured one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from faults.kill_now_and_then import Life, expected_ratio, live
from faults.running import end_in_order
from faults.save_stall import LARGE, TINY, Size, Stall, measure

STEP_SECONDS = 0.02
EVERY_STEPS = 25
MEANS_SECONDS = (60, 120, 300, 600)


def main() -> int:
    arguments = _parser().parse_args()
    end_in_order()
    folder = Path(tempfile.mkdtemp(prefix="goodput-"))
    stalls = [(size, measure(folder / f"stall-{size.width}", size, 2)) for size in (TINY, LARGE)]
    lives = [
        live(
            folder / f"kills-{ranks}",
            ranks,
            epochs=arguments.epochs,
            step_seconds=STEP_SECONDS,
            every_steps=EVERY_STEPS,
            mean_seconds=arguments.mean_seconds,
            seed=arguments.seed + ranks,
        )
        for ranks in arguments.ranks
    ]
    print(stall_table(stalls), "", sep="\n")
    print(kill_table(list(zip(arguments.ranks, lives, strict=True)), stalls[0][1]))
    shutil.rmtree(folder)
    return 0


def stall_table(stalls: list[tuple[Size, Stall]]) -> str:
    """What a save adds, by model."""
    lines = ["| model | step | saved every | next step longer by | whole interval longer by | share |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {size.name} | {1e3 * stall.step_seconds:.2f} ms | {size.every_steps} steps | "
        f"{1e3 * stall.first_seconds:.1f} ms | {1e3 * stall.interval_seconds:.1f} ms | {stall.share:.1%} |"
        for size, stall in stalls
    ]
    return "\n".join(lines)


def kill_table(lives: list[tuple[int, Life]], stall: Stall) -> str:
    """What kills cost, by number of ranks: measured on the left, computed from those parts on the right."""
    means = " | ".join(f"at {seconds} s" for seconds in MEANS_SECONDS)
    head = f"| ranks | kills | up | restart | lost steps | step | measured ratio | computed for it | {means} |"
    lines = [head, "|---" * (8 + len(MEANS_SECONDS)) + "|"]
    for ranks, life in lives:
        parts = {
            "restart_seconds": life.restart_seconds,
            "interval_seconds": EVERY_STEPS * life.step_seconds,
            "stall_seconds": max(0.0, stall.interval_seconds),
        }
        computed = [expected_ratio(seconds, **parts) for seconds in (life.up_seconds, *MEANS_SECONDS)]
        lines.append(
            f"| {ranks} | {life.kills} | {life.up_seconds:.1f} s | {life.restart_seconds:.1f} s | {life.lost_steps:.1f} | "
            f"{1e3 * life.step_seconds:.1f} ms | {life.ratio:.0%} | "
            + " | ".join(f"{each:.1%}" for each in computed)
            + " |"
        )
    lines.append("\nEach example was used exactly once in every epoch of each of these runs.")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--mean-seconds", type=float, default=4.0, help="between a start of the ranks and the next kill"
    )
    parser.add_argument(
        "--epochs", type=int, default=160, help=f"of 4 steps that take {1e3 * STEP_SECONDS:.0f} ms and more"
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
