"""The job that is injured, and the weights that an undisturbed run of it ends with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddp.job import parse_job
from faults import evidence, faulty_task_file
from faults.running import Ranks, run
from faults.verdict import UnexpectedError, expect

STEPS = 30
START_SECONDS = 120.0  # for ranks to come up where other work keeps the cores busy


def write_job(folder: Path, task: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Put job.toml and its task into `folder`; `settings` are `section__key=value`, `task` the task's options."""
    table: dict[str, dict[str, Any]] = {
        "run": {"id": "run", "device": "cpu", "threads_per_rank": 1},
        "task": {"name": "faulty_task:Task", "options": dict(task or {})},
        "batch": {"global_batch_size": 24, "micro_batch_size": 24},
        "optimizer": {"name": "adam", "learning_rate": 0.01},
        "transport": {"timeout_seconds": 20.0},
        "metrics": {"enabled": False},
        "evaluation": {"metric": "error", "every_steps": 10},
        "checkpoint": {"every_steps": 7},
        "noise_scale": {"sample_every": 3},  # "auto" goes by the clock, and sampled steps have more micro-batches
    }
    for name, value in settings.items():
        section, _, key = name.partition("__")
        table.setdefault(section, {})[key] = value
    if "epochs" not in table["run"]:
        table["run"].setdefault("steps", STEPS)
    (folder / "job.toml").write_text(parse_job(table).to_toml())
    shutil.copy(faulty_task_file(), folder / "faulty_task.py")


def undisturbed(beside: Path, ranks: int, **settings: Any) -> str:
    """What `weights` of a run with so many ranks come to, when nobody disturbs it; kept beside the cases."""
    described = "-".join(f"{name}-{value}" for name, value in sorted(settings.items()))
    folder = beside.parent / f"undisturbed-{ranks}-{described}"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_job(folder, **settings)
        ended = run(Ranks("warm", ranks), folder)
        expect(ended.code == 0, f"the undisturbed run failed: {ended}")
        (folder / "done").touch()
    return evidence.weights(folder, ranks)


def expect_same_end(folder: Path, ranks: int, **settings: Any) -> None:
    """The run in `folder` ended with the weights of one that nobody disturbed, bit for bit.

    Raises:
        UnexpectedError: it did not.
    """
    have, want = evidence.weights(folder, ranks), undisturbed(folder, ranks, **settings)
    if have != want:
        raise UnexpectedError(f"it ended with other weights ({have[:8]}) than an undisturbed run ({want[:8]})")
