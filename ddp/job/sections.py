"""The other tables: the run itself, the transport, what is measured, evaluated, saved and served."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ddp.errors import UsageError
from ddp.job.fields import NonNegative, NonNegativeFloat, PathText, Positive, PositiveFloat, Section
from ddp.job.run_id import check_run_id


class RunSection(Section):
    """What the run is called, where it goes, how long it lasts."""

    id: str | None = None
    directory: PathText = "runs"
    seed: NonNegative = 0
    epochs: Positive | None = None
    steps: Positive | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_rank: Positive | None = Field(default=None, description="cores / local ranks where left out")

    @field_validator("id")
    @classmethod
    def _id_is_a_file_name(cls, value: str | None) -> str | None:
        return None if value is None else check_run_id(value)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class TransportSection(Section):
    """How gradients are averaged over ranks."""

    name: Literal["auto", "shared_memory", "c10d", "mpi", "hierarchical"] = "auto"
    timeout_seconds: PositiveFloat = Field(default=300.0, description="for a rank to come before the others give it up")
    wire: Literal["gradient", "bfloat16", "float16", "int8"] = Field(
        default="gradient", description="what gradients travel as: as they are, or narrower; sums are always wider"
    )
    overlap: Literal["auto", True, False] = Field(
        default="auto", description="a thread averages while backward goes on; auto: where a rank has a core for it"
    )
    pin: Literal["auto", True, False] = Field(
        default="auto", description="ranks keep to cores of their own; auto: where ranks <= cores and nobody bound them"
    )

    @model_validator(mode="after")
    def _c10d_sends_gradients_as_they_are(self) -> Self:
        if self.name == "c10d" and self.wire != "gradient":
            raise ValueError(
                f'wire "{self.wire}" does not go with c10d, which would round the sums again on every hop: '
                'use another transport, or wire = "gradient"'
            )
        return self


class NoiseScaleSection(Section):
    """What is measured while training."""

    enabled: bool = True
    sample_every: Literal["auto"] | Positive = Field(
        default="auto",
        description="steps between those whose micro-batches, layers and preconditioned norms are measured too; "
        "auto: a fiftieth of the steps so far, until that costs half a percent, or 16 where the learning rate follows the "
        "noise scale",
    )
    split: Literal["auto", True, False] = Field(
        default="auto",
        description="one rank without accumulation: take sampled steps in two halves; auto: unless the model has "
        "batch statistics, which halves would change; true: every step",
    )
    layers: bool = Field(default=True, description="one noise scale a layer and a parameter group, in sampled steps")
    critical_batch_result: PathText | None = Field(
        default=None, description="result.json of `ddp critical-batch`, to be shown beside the noise scale"
    )


class EvaluationSection(Section):
    """When to evaluate, and the metric that the summary watches for its target."""

    every_epochs: Positive | None = None
    every_steps: Positive | None = None
    metric: str = "accuracy"
    target: float | None = Field(default=None, description="reported when `metric` first reaches it")

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps")
        return self


class DataSection(Section):
    """How examples are fetched."""

    workers: NonNegative = Field(default=0, description="processes a rank that fetch ahead; 0: the rank fetches itself")
    prefetch: Annotated[int, Field(ge=1, le=100)] = Field(
        default=2, description="micro-batches that each worker fetches ahead"
    )


class CheckpointSection(Section):
    """When the run's state is saved, and which of the checkpoints stay."""

    every_steps: Positive | None = Field(default=None, description="besides the one at the end")
    every_seconds: PositiveFloat = Field(default=600.0, description="at the latest so long after the one before")
    keep: Positive = Field(default=2, description="the newest so many stay")
    keep_best: NonNegative = Field(default=1, description="and so many of the best by evaluation.metric")


class FaultsSection(Section):
    """What happens where a number or a rank goes wrong."""

    on_not_finite: Literal["stop", "skip", "roll_back"] = Field(
        default="stop",
        description="where a loss or a gradient is not finite: end with code 3, pass over the step, or go back to the "
        "newest checkpoint and pass over the step when it comes again",
    )
    max_skipped_steps: Positive = Field(default=10, description="in a row; then the run stops")
    max_roll_backs: Positive = Field(default=3, description="in a run; then it stops")
    check_replicas_every_steps: Literal[False] | Positive = Field(
        default=100, description="steps between comparisons of all ranks' parameters by checksum; false: never"
    )


class MetricsSection(Section):
    """Where Prometheus reads the run. Beyond this machine it is TLS, or `--insecure` on the command line."""

    enabled: bool = True
    host: Annotated[PathText, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=0, description="0 takes a free one")
    hold_seconds: NonNegativeFloat = Field(default=0.0, description="keep serving after the end, for a last scrape")
    certificate: PathText | None = Field(default=None, description="PEM file: serve over TLS")
    private_key: PathText | None = Field(default=None, description="PEM file of its key, readable by its owner alone")
    client_certificates: PathText | None = Field(
        default=None, description="PEM file: answer only clients whose certificate one of these has signed"
    )

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together")
        if self.client_certificates is not None and self.certificate is None:
            raise ValueError("client_certificates needs certificate and private_key: there is no client's without TLS")
        return self


def check_exposure(section: MetricsSection, *, insecure: bool) -> None:
    """Refuse to show metrics to other machines in clear, unless whoever starts the run says so.

    No job file can say so: one that is handed on must not open a port on the next machine.

    Raises:
        UsageError: it says what to do.
    """
    if section.enabled and not is_loopback(section.host) and section.certificate is None and not insecure:
        raise UsageError(
            f"metrics.host: {section.host} is reached from other machines, and anyone there could read the metrics: set "
            "metrics.certificate and metrics.private_key, leave metrics.host out, or start with --insecure"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; a name other than localhost may be anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
