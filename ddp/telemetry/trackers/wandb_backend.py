"""Weights & Biases: online, or offline into the run's directory. Nothing of the machine or the code is collected.

The id of its run is kept beside the run, so that a resumed one goes on in it. Numbers are drawn over `step`, which may
go back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from ddp.telemetry.trackers.scalars import scalars

NOTE = "wandb-run"


class WandB:
    """Whom the service trusts is in the environment."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        run, note = opening["run"], Path(opening["folder"]) / NOTE
        self._metric = run["metric"]
        goes_on = run["start_step"] or opening.get("again")
        self._run = wandb.init(
            project=opening["project"],
            name=run["run_id"],
            id=_noted(note) if goes_on else None,
            resume="allow",
            dir=opening["folder"],
            config=dict(opening["settings"]),
            save_code=False,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                x_disable_machine_info=True,
            ),
        )
        note.write_text(self._run.id, encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if values := scalars(line, self._metric):
                self._run.log({"step": line["step"], "epoch": line["epoch"], **values})

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=int(not finished))


def _noted(note: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return note.read_text(encoding="utf-8")
    return None
