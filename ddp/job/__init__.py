"""The job file: TOML in, a validated and frozen `Job` out. Loads no torch.

Everything a run depends on is a field here, with its unit in its name and its bounds in its type, so
that a bad job is refused on a login node in a fraction of a second. Names of tasks, optimizers,
schedules and transports are listed here for the same reason; the code behind them is elsewhere.
"""

from ddp.job.batch import UNITS, BatchSection
from ddp.job.ending import AveragedWeightsSection, EarlyStoppingSection
from ddp.job.fields import Positive, PositiveFloat, Section
from ddp.job.image_tasks import (
    Activation,
    ConvolutionalSection,
    DigitsSection,
    ImagesSection,
    SyntheticImagesSection,
)
from ddp.job.initialisation import InitialisationSection
from ddp.job.job_file import Job, apply_overrides, load_job, parse_job
from ddp.job.optimization import GroupSection, OptimizerSection
from ddp.job.plain_file import opened_plain_file, read_plain_file
from ddp.job.precision import NormalisationSection, PrecisionSection
from ddp.job.private_file import read_private_file
from ddp.job.record import RecordSection
from ddp.job.regularisation import Regulariser, regularisers, with_regulariser, without_regularisation
from ddp.job.run_id import (
    RUN_ID,
    RUN_ID_VARIABLE,
    check_run_id,
    generate_run_id,
    resolve_run_id,
    run_id_is_given,
)
from ddp.job.sampling import SamplingSection
from ddp.job.schedule import ScheduleSection
from ddp.job.secret_hooks import hide_secrets_in_hooks
from ddp.job.secrets import RedactingFormatter, hide, redact, resolve_secrets
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
    QuadraticSection,
    TaskSection,
    TextSection,
    check_import,
)
from ddp.job.toml_file import read_toml
from ddp.job.trackers import TrackersSection
from ddp.job.watching import WatchingSection

__all__ = [
    "RUN_ID",
    "RUN_ID_VARIABLE",
    "TASKS",
    "UNITS",
    "Activation",
    "AveragedWeightsSection",
    "BatchSection",
    "CheckpointSection",
    "ConvolutionalSection",
    "CustomSection",
    "DataSection",
    "DigitsSection",
    "EarlyStoppingSection",
    "FaultsSection",
    "GroupSection",
    "ImagesSection",
    "InitialisationSection",
    "Job",
    "MetricsSection",
    "NoiseScaleSection",
    "NormalisationSection",
    "OptimizerSection",
    "Positive",
    "PositiveFloat",
    "PrecisionSection",
    "QuadraticSection",
    "RecordSection",
    "RedactingFormatter",
    "Regulariser",
    "SamplingSection",
    "ScheduleSection",
    "Section",
    "SyntheticImagesSection",
    "TaskSection",
    "TextSection",
    "TrackersSection",
    "TransportSection",
    "WatchingSection",
    "apply_overrides",
    "check_exposure",
    "check_import",
    "check_run_id",
    "generate_run_id",
    "hide",
    "hide_secrets_in_hooks",
    "is_loopback",
    "load_job",
    "opened_plain_file",
    "parse_job",
    "read_plain_file",
    "read_private_file",
    "read_toml",
    "redact",
    "regularisers",
    "resolve_run_id",
    "resolve_secrets",
    "run_id_is_given",
    "with_regulariser",
    "without_regularisation",
]
