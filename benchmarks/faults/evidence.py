"""What a run left behind: its outcome, its checkpoints, its weights, and what its metrics say meanwhile."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

from ddp import outcome
from ddp.outcome import Outcome
from faults.running import Ended
from faults.verdict import UnexpectedError, expect
from launch.submit import descendants

RUN = Path("runs", "run")


def outcome_of(folder: Path) -> Outcome:
    """What outcome.json in the run directory says."""
    found = outcome.read(folder / RUN / outcome.FILE_NAME)
    if found is None:
        raise UnexpectedError("there is no outcome.json in the run directory")
    return found


def harm(folder: Path) -> dict[str, Any] | None:
    """What the task noted of its deed: time, step, rank, pid; None as long as it did nothing."""
    try:
        return json.loads((folder / "harmed").read_text())
    except FileNotFoundError:
        return None


def harm_done(folder: Path, ended: Ended) -> dict[str, Any]:
    """The same where the run has ended."""
    done = harm(folder)
    if done is None:
        raise UnexpectedError(f"the fault was never injected: {ended}")
    return done


def weights(folder: Path, ranks: int) -> str:
    """Of the last evaluation, the same on all ranks."""
    each = {(folder / f"weights-{rank}").read_text() for rank in range(ranks)}
    expect(len(each) == 1, f"the ranks ended with {len(each)} different sets of weights")
    return each.pop()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of the run, the newest first."""
    return sorted((folder / RUN / "checkpoints").glob("step-*"), reverse=True)


def metrics_address(folder: Path) -> str | None:
    """Host and port of the run's metrics page; None where there is none yet."""
    for file in (folder / "runs" / "targets").glob("*.json"):
        with contextlib.suppress(ValueError):
            (target,) = json.loads(file.read_text())
            return target["targets"][0]
    return None


def metric(folder: Path, name: str) -> float | None:
    """A value on the run's metrics page; None where there is no page or no such metric."""
    address = metrics_address(folder)
    if address is None:
        return None
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5.0) as page:
            return value_on(page.read().decode(), name)
    except OSError:
        return None


def value_on(page: str, name: str) -> float | None:
    """The value of the metric `name` on a metrics page."""
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    return None if found is None else float(found[1])


def expect_valid_checkpoint(folder: Path) -> Path:
    """The newest checkpoint is whole."""
    from ddp import checkpoint
    from ddp.errors import CheckpointError

    found = checkpoints(folder)
    expect(found, "there is no checkpoint")
    try:
        checkpoint.verify(found[0])
    except CheckpointError as error:
        raise UnexpectedError(f"the newest checkpoint is not whole: {error}") from None
    return found[0]


def rank_processes(starter: int) -> int:
    """How many processes below `starter` run `ddp train`."""
    count = 0
    for process_id in descendants(starter):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process_id}/cmdline").read_text().split("\0")
            count += [word for word in words[1:5] if word != "-u"][:3] == ["-m", "ddp", "train"]  # torchrun adds -u
    return count
