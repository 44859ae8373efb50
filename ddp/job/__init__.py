"""The job file: TOML in, a validated and frozen `Job` out. Loads no torch.

Everything a run depends on is a field here, with its unit in its name and its bounds in its type, so
that a bad job is refused on a login node in a fraction of a second. Names of tasks, optimizers,
schedules and transports are listed here for the same reason; the code behind them is elsewhere.
"""

from ddp.job.batch import UNITS, BatchSection
from ddp.job.ending import AveragedWeightsSection, EarlyStoppingSection
from ddp.job.fields import Positive, PositiveFloat, Section
from ddp.job.job_file import Job, apply_overrides, load_job, parse_job
from ddp.job.optimization import OptimizerSection, ScheduleSection
from ddp.job.plain_file import read_plain_file
from ddp.job.precision import NormalisationSection, PrecisionSection
from ddp.job.private_file import read_private_file
from ddp.job.run_id import (
    RUN_ID,
    RUN_ID_VARIABLE,
    check_run_id,
    generate_run_id,
    resolve_run_id,
    run_id_is_given,
)
from ddp.job.sampling import SamplingSection
from ddp.job.secret_hooks import hide_secrets_in_hooks
from ddp.job.secrets import RedactingFormatter, redact, resolve_secrets
from ddp.job.sections import (
    CheckpointSection,
    DataSection,
    FaultsSection,
    MetricsSection,
    NoiseScaleSection,
    TransportSection,
    check_exposure,
    is_loopback,
)
from ddp.job.tasks import (
    TASKS,
    CustomSection,
    DigitsSection,
    QuadraticSection,
    TaskSection,
    TextSection,
    check_import,
)
from ddp.job.toml_file import read_toml

__all__ = [
    "RUN_ID",
    "RUN_ID_VARIABLE",
    "TASKS",
    "UNITS",
    "AveragedWeightsSection",
    "BatchSection",
    "CheckpointSection",
    "CustomSection",
    "DataSection",
    "DigitsSection",
    "EarlyStoppingSection",
    "FaultsSection",
    "Job",
    "MetricsSection",
    "NoiseScaleSection",
    "NormalisationSection",
    "OptimizerSection",
    "Positive",
    "PositiveFloat",
    "PrecisionSection",
    "QuadraticSection",
    "RedactingFormatter",
    "SamplingSection",
    "ScheduleSection",
    "Section",
    "TaskSection",
    "TextSection",
    "TransportSection",
    "apply_overrides",
    "check_exposure",
    "check_import",
    "check_run_id",
    "generate_run_id",
    "hide_secrets_in_hooks",
    "is_loopback",
    "load_job",
    "parse_job",
    "read_plain_file",
    "read_private_file",
    "read_toml",
    "redact",
    "resolve_run_id",
    "resolve_secrets",
    "run_id_is_given",
]
