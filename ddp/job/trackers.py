"""The [trackers] table: services and files beside the run's own record that are told of it.

Where they are may stand here; keys, tokens and passwords come from the environment alone (`WANDB_API_KEY`,
`MLFLOW_TRACKING_TOKEN`, `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`), under their services' own names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ddp.job.fields import NonNegativeFloat, PathText, Positive, Section
from ddp.job.secrets import PASSWORD_IN_URL

Tracker = Literal["tensorboard", "mlflow", "wandb"]
SCHEMES = ("http", "https", "file", "sqlite")


class TrackersSection(Section):
    """Which trackers hear of the run, besides run.db and log.jsonl, which always do."""

    names: tuple[Tracker, ...] = ()
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f/\\#?%:]+$")] = Field(
        default="ddp", description="of Weights & Biases; MLflow's experiment"
    )
    mlflow_uri: PathText | None = Field(
        default=None,
        description="http, https, sqlite or file; MLFLOW_TRACKING_URI where left out, else the run's own directory",
    )
    wandb_offline: bool = Field(default=False, description="write into the run's directory, for `wandb sync` later")
    every_steps: Positive = Field(default=10, description="steps between those that trackers are told of")
    patience_seconds: NonNegativeFloat = Field(
        default=10.0,
        description="at most so long the end of a run waits for all of them together, and half of transport.timeout_seconds",
    )

    @field_validator("names", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @field_validator("names")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a tracker is named twice")
        return value

    @field_validator("mlflow_uri")
    @classmethod
    def _of_a_known_kind(cls, value: str | None) -> str | None:
        if value is None:
            return value
        if PASSWORD_IN_URL.search(value):
            raise ValueError(
                "a password does not belong into a job file: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if urlsplit(value).scheme not in SCHEMES:
            raise ValueError(f"an address begins with one of {', '.join(f'{each}:' for each in SCHEMES)}")
        return value
