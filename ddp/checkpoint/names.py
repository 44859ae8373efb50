"""What checkpoints and their files are called, and which of them a directory holds.

The step counts; a metric's value in a name is there to be read by people, the manifest has the exact one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ddp.errors import CheckpointError

SHARED = "shared.safetensors"
MANIFEST = "manifest.json"
NOTE_SUFFIX = ".note"
REPLACED = ".replaced"
# A directory that gave way to a new one of the same step keeps a readable name until the new one has its own.
STEP_DIRECTORY = re.compile(
    r"step-(?P<step>[0-9]{8,18})(-[A-Za-z0-9_.]+=-?([0-9.]+(e[-+][0-9]+)?|nan|inf))?(?P<replaced>\.replaced)?"
)
_LONGEST_METRIC_NAME = 60


@dataclass(frozen=True, slots=True)
class Metric:
    """A validation metric taken at the checkpoint's step; `goal` is "max" or "min"."""

    name: str
    value: float
    goal: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory with a checkpoint's name; `is_replaced` where one of the same step was about to take its place."""

    step: int
    is_replaced: bool
    path: Path


def directory_name(step: int, metric: Metric | None = None) -> str:
    """Such as step-00000120, or step-00000120-accuracy=0.9721."""
    if metric is None:
        return f"step-{step:08d}"
    cleaned = re.sub(r"[^A-Za-z0-9_.]+", "_", metric.name)[:_LONGEST_METRIC_NAME] or "metric"
    return f"step-{step:08d}-{cleaned}={metric.value:.4g}"


def partial_name(step: int, number: int) -> str:
    """Of the directory that a save is written to; `number` tells apart the saves of one process."""
    return f".step-{step:08d}.{number}.partial"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def part_names(world_size: int) -> list[str]:
    """All files of a checkpoint but its manifest."""
    return [SHARED, *map(rank_file, range(world_size))]


def candidates(directory: Path) -> list[Candidate]:
    """The newest first; of one step the one that was not replaced.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        paths = sorted(directory.iterdir(), reverse=True) if directory.is_dir() else []
    except OSError as fault:
        raise CheckpointError(f"{directory}: cannot be read: {fault.strerror}") from None
    matches = ((STEP_DIRECTORY.fullmatch(path.name), path) for path in paths)
    found = [Candidate(int(match["step"]), match["replaced"] is not None, path) for match, path in matches if match]
    return sorted(found, key=lambda each: (-each.step, each.is_replaced))


def find(directory: Path, step: int) -> Path:
    """The checkpoint of `step`, whatever metric its name has.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in candidates(directory):
        if candidate.step == step:
            return candidate.path
    raise CheckpointError(f"{directory}: no checkpoint of step {step}; python -m ddp checkpoints lists what there is")


def resolve(path: Path) -> Path:
    """`path`, or where nothing is there the one checkpoint whose name goes on from it: step-00000120-accuracy=0.97."""
    if path.exists() or not re.fullmatch(r"step-[0-9]+(-.*)?", path.name):
        return path
    longer = [each for each in candidates(path.parent) if re.match(re.escape(path.name) + r"(?![0-9])", each.path.name)]
    return longer[0].path if len({each.step for each in longer}) == 1 else path
