"""What tests of trackers share; importing it skips them where the libraries are not installed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ddp.job import TrackersSection
from ddp.telemetry.records import RunInfo
from ddp.telemetry.trackers.group import Trackers
from telemetry_records import feed

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")
pytest.importorskip("wandb")

SETTINGS = {"optimizer.name": "adam", "run.threads_per_rank": 2, "task.options.a:b": [1.5, float("inf")]}
EVERY = 10


def section(*names: str, **settings: Any) -> TrackersSection:
    return TrackersSection.model_validate(
        {"names": list(names), "every_steps": EVERY, "wandb_offline": True, "patience_seconds": 60.0, **settings}
    )


def tell(folder: Path, chosen: TrackersSection, info: RunInfo, last_step: int) -> None:
    """All of a part of a run, to its end."""
    trackers = Trackers(chosen, info, SETTINGS, folder)
    feed(trackers, info, last_step)
    trackers.close()
    trackers.close()


def processes_in(folder: Path) -> list[int]:
    """Those whose working directory is there, which is where a tracker's own and what it starts work."""
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(each)).is_relative_to(folder.resolve()):
                found.append(int(each.parent.name))
    return found


def read_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [each.step for each in read.Scalars("training/loss")]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
