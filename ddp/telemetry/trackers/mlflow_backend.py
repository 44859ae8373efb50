"""MLflow, through its client alone: no run is active, nothing is logged by itself, no file is uploaded.

The id of MLflow's run is kept beside the run, so that a resumed one goes on in it. MLflow forgets nothing: a step that is
taken again is there twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from ddp.telemetry.trackers.scalars import plain, scalars

NOTE = "mlflow-run"
MOST_PARAMETERS = 100  # in one request
LONGEST_PARAMETER = 500  # characters
MOST_METRICS = 1000  # in one request


class MLflow:
    """Where the server is, and whom it trusts, is in the environment."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        run, self._note = opening["run"], Path(opening["folder"]) / NOTE
        self._metric = run["metric"]
        self._client = MlflowClient()
        earlier = self._earlier_run() if run["start_step"] or opening.get("again") else None
        self._run_id: str = earlier or self._new_run(opening["project"], run)
        if earlier is None:
            self._note.write_text(self._run_id, encoding="utf-8")
        if earlier is None or opening.get("again"):
            self._tell_settings(opening["settings"])

    def write(self, lines: list[dict[str, Any]]) -> None:
        metrics = [
            Metric(name, value, round(1000 * line["unix_time"]), line["step"])
            for line in lines
            for name, value in scalars(line, self._metric).items()
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MOST_METRICS])

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")

    def _earlier_run(self) -> str | None:
        """The one that an earlier process began, if it is still there; it runs again."""
        with contextlib.suppress(FileNotFoundError):
            run_id = self._note.read_text(encoding="utf-8")
            try:
                self._client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return run_id
        return None

    def _new_run(self, project: str, run: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        return self._client.create_run(experiment_id, run_name=run["run_id"]).info.run_id

    def _tell_settings(self, settings: Mapping[str, Any]) -> None:
        values = {plain(name): str(value)[:LONGEST_PARAMETER] for name, value in settings.items()}
        parameters = [Param(name, value) for name, value in values.items()]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[start : start + MOST_PARAMETERS])
        self._client.log_batch(self._run_id, tags=[RunTag("ddp", "noise scale")])
