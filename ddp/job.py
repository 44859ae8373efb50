"""The job file: TOML in, a validated and frozen `Job` out. Loads no torch.

Everything a run depends on is a field here, with its unit in its name and its bounds in its type, so
that a bad job is refused on a login node in a fraction of a second. Names of tasks, optimizers,
schedules and transports are listed here for the same reason; the code behind them is elsewhere.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ddp.errors import JobFileError, UsageError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RUN_ID_VARIABLE = "DDP_RUN_ID"  # set by `launch`, so that every rank and every restart finds one run
UNITS = 4  # gradients of separate examples that a step should have for its noise scale, where that is left open
RUN_AWAY = 1 << 62
CUSTOM_TASK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Section(BaseModel):
    """A table of the job file: no unknown keys, no silent conversions, no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class RunSection(Section):
    """What the run is called, where it goes, how long it lasts."""

    id: str | None = None
    directory: str = "runs"
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


class DigitsSection(Section):
    """scikit-learn's bundled handwritten digits: 1,472 training and 325 validation images, 8x8."""

    name: Literal["digits"]
    channels: Positive = 32
    batch_norm: bool = True
    dropout: Fraction = 0.0


class TextSection(Section):
    """Byte-level language model on the source text of the running Python's standard library."""

    name: Literal["text"]
    context_length: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    width: Positive = 64
    validation_examples: Positive = 512

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class QuadraticSection(Section):
    """A bowl with noisy gradients: synthetic, its training curve and noise scale known exactly. For plain tests."""

    name: Literal["quadratic"]
    dimension: Positive = 64
    noise: NonNegativeFloat = Field(default=1.0, description="standard deviation of an example's gradient, per axis")
    distance: PositiveFloat = Field(default=8.0, description="from the bottom at the start")
    condition_number: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=1.0, description="largest over smallest curvature; the largest is 1"
    )


class CustomSection(Section):
    """A user's own task: `module:attr`, called with `options` as keyword arguments."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


TASKS: Mapping[str, type[Section]] = {"digits": DigitsSection, "text": TextSection, "quadratic": QuadraticSection}


def _task_tag(value: object) -> str | None:
    """Choose the table's type by its name, so that an error speaks of that task alone."""
    name = getattr(value, "name", None) or _name_in(value)
    if not isinstance(name, str):
        return None
    if name in TASKS:
        return name
    return "custom" if CUSTOM_TASK.fullmatch(name) else None


TaskSection = Annotated[
    Annotated[DigitsSection, Tag("digits")]
    | Annotated[TextSection, Tag("text")]
    | Annotated[QuadraticSection, Tag("quadratic")]
    | Annotated[CustomSection, Tag("custom")],
    Discriminator(_task_tag),
]


class BatchSection(Section):
    """Examples a step over all ranks, and examples a rank holds in memory at once."""

    global_batch_size: Positive | Literal["auto"] | None = Field(
        default=None, description='examples a step over all ranks; "auto" follows the noise scale and the step time'
    )
    examples_per_rank: Positive | None = Field(default=None, description="a step, instead of global_batch_size")
    micro_batch_size: Positive | None = Field(
        default=None, description="examples a rank holds at once; ceil(4 / ranks) micro-batches a rank where left out"
    )
    initial: Positive | None = Field(default=None, description="auto: where it starts, 64 where left out")
    smallest: Positive | None = Field(default=None, description="auto: lower limit, the ranks where left out")
    largest: Positive | None = Field(default=None, description="auto: upper limit, 1/8 of the data where left out")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.global_batch_size is None) == (self.examples_per_rank is None):
            raise ValueError("give either global_batch_size or examples_per_rank")
        limits = {"initial": self.initial, "smallest": self.smallest, "largest": self.largest}
        given = [name for name, value in limits.items() if value is not None]
        if given and not self.adapts:
            raise ValueError(f'{", ".join(given)} needs global_batch_size = "auto"')
        low, start, high = self.smallest or 1, self.initial or self.smallest or 1, self.largest or RUN_AWAY
        if not low <= start <= high:
            raise ValueError(f"smallest <= initial <= largest does not hold: {low}, {start}, {high}")
        return self

    @property
    def adapts(self) -> bool:
        """Whether the global batch size is chosen while training."""
        return self.global_batch_size == "auto"

    def examples_per_step(self, world_size: int) -> int:
        """The global batch size over so many ranks; where it adapts itself, the one it starts from.

        Raises:
            JobFileError: a step has fewer examples than there are ranks.
        """
        if self.examples_per_rank is not None:
            return self.examples_per_rank * world_size
        if isinstance(self.global_batch_size, int):
            if world_size > self.global_batch_size:
                raise JobFileError(
                    f"batch.global_batch_size: {self.global_batch_size} examples a step are fewer than the "
                    f"{world_size} ranks; raise it or start fewer ranks"
                )
            return self.global_batch_size
        return max(self.initial or min(max(64, self.smallest or 1), self.largest or RUN_AWAY), world_size)

    def examples_at_once(self, world_size: int, examples_per_step: int | None = None) -> int:
        """The micro-batch size: as given, else so that a step has at least four gradients to compare.

        `examples_per_step`: over all ranks, where that is not what the run starts with.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        whole = self.examples_per_step(world_size) if examples_per_step is None else examples_per_step
        return -(-whole // (world_size * -(-UNITS // world_size)))

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of a rank in a step: ceil(examples_per_step / (world_size * examples_at_once))."""
        return -(-self.examples_per_step(world_size) // (world_size * self.examples_at_once(world_size)))

    def limits(self, world_size: int, training_examples: int) -> tuple[int, int]:
        """The smallest and the largest global batch size where it adapts itself."""
        smallest = max(self.smallest or 1, world_size)
        largest = self.largest or max(training_examples // 8, self.examples_per_step(world_size))
        return smallest, max(min(largest, training_examples), smallest)


class OptimizerSection(Section):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    momentum: Fraction = Field(default=0.0, description="sgd only")
    nesterov: bool = Field(default=False, description="sgd only")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="adam and adamw only")
    epsilon: PositiveFloat = Field(default=1e-8, description="adam and adamw only")
    weight_decay: NonNegativeFloat = 0.0
    gradient_clip_norm: PositiveFloat | None = Field(default=None, description="norm of the mean gradient")
    learning_rate_rule: Literal["auto", "none", "linear", "sqrt", "noise_scale", "adascale"] = Field(
        default="auto", description="how the learning rate follows the batch size; auto: noise_scale"
    )
    learning_rate_exponent: NonNegativeFloat | None = Field(
        default=None, description="of noise_scale's and adascale's factors: 1 for sgd, 1/2 for Adam where left out"
    )
    tuned_batch_size: Positive | None = Field(
        default=None, description="the global batch size that learning_rate was found at; the run's where left out"
    )

    @field_validator("betas", mode="before")
    @classmethod
    def _toml_has_no_tuples(cls, value: object) -> object:
        return tuple(cast(list[Any], value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _keys_of_this_optimizer(self) -> Self:
        foreign = {"sgd": {"betas", "epsilon"}}.get(self.name, {"momentum", "nesterov"})
        defaults = {key: field.default for key, field in OptimizerSection.model_fields.items()}
        if wrong := sorted(key for key in foreign if getattr(self, key) != defaults[key]):
            raise ValueError(f"{', '.join(wrong)} is not a setting of {self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.learning_rate_exponent is not None and self.learning_rate_rule in ("none", "linear", "sqrt"):
            raise ValueError(f"learning_rate_exponent is not a setting of the rule {self.learning_rate_rule}")
        return self

    @property
    def rule(self) -> Literal["none", "linear", "sqrt", "noise_scale", "adascale"]:
        """The learning-rate rule that "auto" stands for, or the one given."""
        return "noise_scale" if self.learning_rate_rule == "auto" else self.learning_rate_rule

    @property
    def rule_exponent(self) -> float:
        """Of the factors of noise_scale and adascale: Adam's steps have a length of their own (Malladi et al. 2022)."""
        if self.learning_rate_exponent is not None:
            return self.learning_rate_exponent
        return 1.0 if self.name == "sgd" else 0.5


class ScheduleSection(Section):
    name: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = Field(default=0.0, description="cosine: last learning rate / peak")


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
        "auto: so that it costs half a percent, or every 16 where the learning rate follows the noise scale",
    )
    split: Literal["auto", True, False] = Field(
        default="auto",
        description="one rank without accumulation: take sampled steps in two halves; auto: unless the model has "
        "batch statistics, which halves would change; true: every step",
    )
    layers: bool = Field(default=True, description="one noise scale a layer and a parameter group, in sampled steps")
    critical_batch_result: str | None = Field(
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


class CheckpointSection(Section):
    every_steps: Positive | None = Field(default=None, description="besides the one at the end")
    keep: Positive = 2


class MetricsSection(Section):
    enabled: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=0, description="0 takes a free one")
    hold_seconds: NonNegativeFloat = Field(default=0.0, description="keep serving after the end, for a last scrape")

    @field_validator("host")
    @classmethod
    def _loopback(cls, value: str) -> str:
        if value not in {"127.0.0.1", "::1", "localhost"}:
            raise ValueError("metrics are served on loopback only: 127.0.0.1, ::1 or localhost")
        return value


class Job(Section):
    """One training job; `Job.model_validate` of the parsed TOML, see `load_job`."""

    run: RunSection
    task: TaskSection
    batch: BatchSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    transport: TransportSection = TransportSection()
    noise_scale: NoiseScaleSection = NoiseScaleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()

    @model_validator(mode="after")
    def _what_adapts_is_measured(self) -> Self:
        if self.batch.adapts and not self.noise_scale.enabled:
            raise ValueError('batch.global_batch_size = "auto" follows the noise scale: it needs noise_scale.enabled')
        return self

    @model_validator(mode="after")
    def _micro_fits_global(self) -> Self:
        micro, whole = self.batch.micro_batch_size, self.batch.global_batch_size
        if micro is not None and isinstance(whole, int) and micro > whole:
            raise ValueError("batch.micro_batch_size is larger than batch.global_batch_size")
        return self

    def to_toml(self) -> str:
        """The resolved job as TOML that `load_job` reads back to an equal `Job`."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read, override and validate a job file.

    Args:
        path: the TOML file.
        overrides: `section.key=value` strings; a value is TOML where it parses as such, else a string.

    Raises:
        JobFileError: one message with a line for each fault: file, field path, what is valid.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobFileError(f"{path}: cannot read the job file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobFileError(f"{path}: the job file is not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise JobFileError(f"{path}: not valid TOML: {error}") from None
    return parse_job(apply_overrides(table, overrides), source=str(path))


def parse_job(table: Mapping[str, Any], source: str = "job") -> Job:
    """Validate an already parsed table; `source` names it in messages."""
    try:
        return Job.model_validate(table)
    except ValidationError as error:
        faults = [_describe(fault) for fault in _one_a_value(error.errors(include_url=False))]
        raise JobFileError("\n".join(f"{source}: {fault}" for fault in faults)) from None


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`table` with each `section.key=value` of `overrides` put on top; `table` stays as it is."""
    result: dict[str, Any] = copy.deepcopy(dict(table))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or len(keys) < 2 or not all(keys):
            raise JobFileError(f"--set {override}: write section.key=value, for example run.epochs=3")
        target = result
        for key in keys[:-1]:
            child: object = target.setdefault(key, {})
            if not isinstance(child, dict):
                raise JobFileError(f"--set {override}: {key} is not a table")
            target = cast(dict[str, Any], child)
        target[keys[-1]] = _toml_value(text.strip())
    return result


def check_run_id(value: str) -> str:
    """`value` if it can name a run directory, else a ValueError that says what can."""
    if not RUN_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a run id: 1 to 64 letters, digits, dots, hyphens or underscores, "
            "the first a letter or digit"
        )
    return value


def run_id_is_given(job_run_id: str | None, environ: Mapping[str, str]) -> bool:
    """Whether something other than chance names the run, so that a restart finds it."""
    return job_run_id is not None or resolve_run_id(None, environ, "") != ""


def resolve_run_id(job_run_id: str | None, environ: Mapping[str, str], generated: str) -> str:
    """The run's id: the job's own, else `launch`'s, Slurm's or torchrun's, so that a restart finds its run.

    Raises:
        UsageError: the variable that decides does not hold a valid run id.
    """
    if job_run_id is not None:
        return job_run_id
    for name in (RUN_ID_VARIABLE, "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        value = environ.get(name, "")
        if value in ("", "none"):  # "none" is what torchrun says where it was given no id
            continue
        try:
            return check_run_id(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}; set run.id in the job file") from None
    return generated


def generate_run_id(name: str, utc: datetime, token: str) -> str:
    """A fresh run id: `name`, cut and cleaned until it can begin one, the time, and `token` against collisions."""
    tail = f"-{utc:%Y%m%d-%H%M%S}-{token}"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[: 64 - len(tail)] or "run"
    return check_run_id(stem + tail)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _one_a_value(faults: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """A value that may be a number or "auto" fails once for each: tell it once, by what a number would need."""
    told: dict[tuple[int | str, ...], ErrorDetails] = {}
    for fault in faults:
        *where, last = fault["loc"] or ("",)
        if last not in ("constrained-int", "literal['auto']"):
            told[fault["loc"]] = fault
        elif last == "constrained-int":
            told[tuple(where)] = {
                **fault,
                "loc": tuple(where),
                "msg": fault["msg"].replace("should be", 'should be "auto" or'),
            }
        else:
            told.setdefault(tuple(where), fault)  # keeps its place; every such union has a number too
    return list(told.values())


def _describe(fault: ErrorDetails) -> str:
    """One line for one pydantic error, in the job file's own terms."""
    section, path = _resolve(fault["loc"])
    where = ".".join(path)
    match fault["type"]:
        case "extra_forbidden":
            valid = list(section.model_fields) if section else []
            return f"{where}: unknown key{_did_you_mean(path[-1], valid)}; valid: {', '.join(valid)}"
        case "missing":
            return f"{where}: missing"
        case "union_tag_not_found":
            name = _name_in(fault["input"])
            valid = f"valid: {', '.join(TASKS)} or module:attr"
            if name is None:
                return f"{where}.name: missing; {valid}"
            return f"{where}.name: unknown task {name!r}{_did_you_mean(str(name), TASKS)}; {valid}"
        case "literal_error":
            expected = fault["ctx"]["expected"] if "ctx" in fault else ""
            valid = [
                word.strip("'")
                for word in re.findall(
                    r"'[^']*'|true|false", expected.replace("True", "true").replace("False", "false")
                )
            ]
            return f"{where}: {fault['input']!r} is not valid{_did_you_mean(str(fault['input']), valid)}; valid: {', '.join(valid)}"
        case "value_error":
            message = fault["msg"].removeprefix("Value error, ")
            return f"{where}: {message}" if where else message
        case _:
            message = fault["msg"].removeprefix("Input should be ")
            hint = _did_you_mean(str(fault["input"]), ["auto"]) if message.startswith('"auto" or') else ""
            return f"{where}: should be {message}, not {_short(fault['input'])}{hint}"


def _resolve(loc: tuple[int | str, ...]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that holds the faulty key, and the field path without the union's tag."""
    section: type[BaseModel] | None = Job
    path: list[str] = []
    parts = [str(part) for part in loc]
    if len(parts) > 1 and parts[0] == "task" and parts[1] in {*TASKS, "custom"}:
        section = TASKS.get(parts.pop(1), CustomSection)
        return section, parts
    for part in parts:
        path.append(part)
        if len(path) < len(parts) and section is not None:
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
            section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return section, path


def _name_in(table: object) -> object:
    return cast(Mapping[str, object], table).get("name") if isinstance(table, Mapping) else None


def _did_you_mean(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
