"""The environment of a tracker's process: the user's own, quiet, with its files in the run's directory.

What the user has set is kept, but for one thing: MLflow's credentials go to a server that the environment names, or to
none. A job file that is handed on must not send them somewhere else.
"""

from __future__ import annotations

import os
import site
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ddp.job import TrackersSection, hide

SECRET_VARIABLES = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
MLFLOW_URI = "MLFLOW_TRACKING_URI"
PACKAGES = Path(__file__).resolve().parents[3]


def hide_secrets(environ: Mapping[str, str]) -> None:
    """Keep the trackers' keys and passwords out of all that this process prints and writes."""
    for name in SECRET_VARIABLES:
        hide(environ.get(name, ""))
    hide(urlsplit(environ.get(MLFLOW_URI, "")).password or "")


def tracker_environment(
    tracker: str, section: TrackersSection, folder: Path, environ: Mapping[str, str]
) -> dict[str, str]:
    """Of the process of `tracker`, whose files go into `folder`."""
    result = {**_defaults(tracker, folder), **environ}
    result["PYTHONPATH"] = os.pathsep.join([str(PACKAGES), *filter(None, [environ.get("PYTHONPATH")])])
    if tracker == "mlflow":
        _point_mlflow(result, section, folder)
    if tracker == "wandb" and section.wandb_offline:
        result["WANDB_MODE"] = "offline"
    return result


def mlflow_uri(section: TrackersSection, folder: Path, environ: Mapping[str, str]) -> str:
    """Where MLflow's runs go: as the job says, else the environment, else into the run's directory."""
    named = section.mlflow_uri or environ.get(MLFLOW_URI)
    return _from_here(named) if named else folder.resolve().as_uri()


def _from_here(uri: str) -> str:
    """A path in it counts from where the run was started, not from the folder that MLflow's process works in."""
    for beginning in ("sqlite:///", "file:"):
        path = uri.removeprefix(beginning)
        if path != uri and not path.startswith("/"):
            return beginning + os.path.join(os.getcwd(), path)
    return uri


def _point_mlflow(result: dict[str, str], section: TrackersSection, folder: Path) -> None:
    uri = mlflow_uri(section, folder, result)
    if uri != _from_here(result.get(MLFLOW_URI, "")):
        for name in [name for name in result if name.startswith("MLFLOW_TRACKING_")]:
            del result[name]
        packages = site.getuserbase()  # MLflow may be installed there, and is found by HOME
        result |= {"HOME": str(folder), "NETRC": os.devnull, "PYTHONUSERBASE": packages}  # credentials may lie in HOME
    result[MLFLOW_URI] = uri


def _defaults(tracker: str, folder: Path) -> dict[str, str]:
    """What the user may set otherwise."""
    common = {"OMP_NUM_THREADS": "1"}
    match tracker:
        case "mlflow":
            return common | {
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # we try again ourselves
                "MLFLOW_ALLOW_FILE_STORE": "true",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            }
        case "wandb":
            names = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
            quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
            return common | quiet | dict.fromkeys(names, str(folder))
        case _:
            return common
