"""The sweep file: a [sweep] table beside a job, read and checked before anything starts. Loads no torch and no Optuna.

Every dimension is tried out on the job with the ends of its range and each of its choices, by the words of `--set`: a key
that does not exist is answered here, with what was perhaps meant, and so is a range that the job refuses.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from ddp.errors import JobFileError, UsageError
from ddp.job import Job, apply_overrides, parse_job, read_toml
from ddp.job.faults import in_words
from ddp.sweep.dimensions import Dimension, is_log_by_default, is_same, override, toml_to_value, value_to_toml
from ddp.sweep.sections import DimensionSection, StageSection, SweepSection
from ddp.sweep.space import Space, Values, in_order

FREE = "task.options."  # keys that no type of the job file knows
OF_CRITICAL_BATCH = ("batch_sizes", "learning_rates", "targets", "subset_examples")
Table = TypeVar("Table", bound=BaseModel)
CHANGEABLE = {
    "job",
    "directory",
    "workers",
    "keep",
    "deadline_seconds",
    "silence_seconds",
    "stop_seconds",
    "start",
    "trials",
}


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search as asked for.

    Attributes:
        name: the sweep file's, without its ending.
        table: the job's tables, as read and overridden.
        job: they, validated.
        dimensions: in an order in which conditions can be decided.
    """

    name: str
    section: SweepSection
    table: dict[str, Any]
    job: Job
    dimensions: tuple[Dimension, ...]

    @property
    def directory(self) -> Path:
        return Path(self.section.directory or f"sweeps/{self.name}")

    @property
    def stages(self) -> tuple[StageSection, ...]:
        """As written, or the one there is where none is."""
        return self.section.stages or (StageSection(name="trials"),)

    def job_value(self, key: str) -> Any:
        """The job's own value of `key`; None where it has none."""
        value: Any = self.job.model_dump(mode="json")
        for part in key.split("."):
            value = cast(dict[str, Any], value).get(part) if isinstance(value, dict) else None
        return value

    def at(self, stage: StageSection) -> Sweep:
        """With what a stage sets on top of the job."""
        if not stage.set:
            return self
        table = apply_overrides(self.table, stage.set)
        return replace(self, table=table, job=parse_job(table))

    def keys_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """The dimensions that subjects and keys name, each once."""
        keys = [key for name in names for key in self.section.subjects.get(name, (name,))]
        return tuple(dict.fromkeys(keys))

    def accepts(self, values: Values) -> bool:
        """Whether the job is valid with these."""
        try:
            parse_job(apply_overrides(self.table, [override(key, value) for key, value in values.items()]))
        except JobFileError:
            return False
        return True

    def definition(self) -> dict[str, Any]:
        """Everything that trials depend on, JSON-able."""
        section = self.section.model_dump(mode="json", exclude=CHANGEABLE)
        for stage in section["stages"]:
            for key in CHANGEABLE & stage.keys():
                del stage[key]
        return {"sweep": section, "job": self.job.model_dump(mode="json", exclude={"metrics": True, "transport": True})}


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read, override and validate a sweep file and its job.

    Args:
        overrides: `section.key=value`, for the sweep's and the job's tables alike.

    Raises:
        JobFileError: one message with a line for each fault.
        UsageError: what is searched cannot be: no dimensions, conditions in a circle, a library that is not there.
    """
    path = Path(path)
    table = _with_job(read_toml(path, "the sweep file"), path)
    table = apply_overrides(table, overrides)
    given = table.pop("sweep", None)
    if given is None:
        raise JobFileError(f"{path}: no [sweep] table: this is no sweep file")
    if isinstance(given, Mapping) and (found := [key for key in OF_CRITICAL_BATCH if key in given]):
        raise JobFileError(f"{path}: sweep.{found[0]} belongs to `ddp critical-batch`, which reads such a file")
    section = _validated(SweepSection, given, f"{path}: sweep")
    job = parse_job(table, source=str(path))
    sweep = Sweep(path.stem, section, table, job, in_order(_dimensions(section, table, path)))
    _check(sweep, str(path))
    return sweep


def _with_job(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sweep file's tables, with those of the job file that it names."""
    given = table.get("sweep", {})
    if not (isinstance(given, Mapping) and isinstance(named := given.get("job"), str)):
        return table
    if extra := sorted(table.keys() - {"sweep"}):
        raise JobFileError(f"{path}: sweep.job names a job file, and {', '.join(extra)} is here too: keep one")
    return {**read_toml(path.parent / named, "the job file"), "sweep": given}


def _validated(kind: type[Table], table: object, where: str) -> Table:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        faults = [_after(where, fault) for fault in in_words(error.errors(include_url=False), kind)]
        raise JobFileError("\n".join(dict.fromkeys(faults))) from None


def _after(where: str, fault: str) -> str:
    """A fault of a key goes on with its path; one of the whole table names none."""
    key, colon, _ = fault.partition(":")
    return f"{where}.{fault}" if colon and " " not in key else f"{where}: {fault}"


def _dimensions(section: SweepSection, table: dict[str, Any], path: Path) -> dict[str, Dimension]:
    flat = _flat(section.dimensions)
    if not flat:
        raise JobFileError(f"{path}: sweep.dimensions: none given: nothing to search")
    found: dict[str, Dimension] = {}
    for key, given in flat.items():
        where = f'{path}: sweep.dimensions."{key}"'
        written = {"values": given} if isinstance(given, list) else given
        found[key] = _dimension(key, _validated(DimensionSection, written, where), table, where)
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys with dots, whether they were quoted or not: a table without a key of a dimension is a level of the path."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        is_level = isinstance(value, dict) and value and all(isinstance(each, dict | list) for each in value.values())
        if is_level and not (value.keys() & DimensionSection.model_fields.keys()):
            found |= _flat(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _dimension(key: str, section: DimensionSection, table: dict[str, Any], where: str) -> Dimension:
    when = {
        name: tuple(value_to_toml(each) for each in (value if isinstance(value, list) else [value]))
        for name, value in section.when.items()
    }
    if section.values is not None:
        if any(isinstance(value, dict) for value in section.values):
            raise JobFileError(f"{where}: a value that is a table cannot be searched")
        choices = tuple(dict.fromkeys(value_to_toml(value) for value in section.values))
        return Dimension(key, "choice", choices=choices, when=when)
    assert section.low is not None and section.high is not None
    low, high = float(section.low), float(section.high)
    log = is_log_by_default(key) if section.scale is None else section.scale == "log"
    if log and low <= 0:
        raise JobFileError(f'{where}: low {low:g} must be above 0 on a log scale; or give scale = "linear"')
    if high == float("inf") or low == float("-inf"):
        raise JobFileError(f"{where}: the ends must be finite")
    whole = isinstance(section.low, int) and isinstance(section.high, int) and not _takes_fractions(key, low, table)
    kind = "int" if whole else "float"
    return Dimension(key, kind, low=low, high=high, log=log, points=section.points, when=when)


def _takes_fractions(key: str, low: float, table: dict[str, Any]) -> bool:
    """Whether the job takes a value that is not whole there: `dropout = { low = 0, high = 1 }` is no choice of two."""
    if key.startswith(FREE):
        return False
    try:
        parse_job(apply_overrides(table, [override(key, low + 0.5)]))
    except JobFileError:
        return False
    return True


def _check(sweep: Sweep, source: str) -> None:
    """All that can be known to be wrong before a trial runs.

    Raises:
        JobFileError, UsageError: it is said which values it is wrong with.
    """
    keys = [each.key for each in sweep.dimensions]
    for dimension in sweep.dimensions:
        if dimension.key in ("run.id", "run.directory", "run.epochs", "run.steps"):
            raise JobFileError(f"{source}: sweep.dimensions: {dimension.key} is the sweep's own; see sweep.stages")
        for parent, allowed in dimension.when.items():
            where = f"{source}: sweep.dimensions.{dimension.key}.when"
            if parent not in keys and sweep.job_value(parent) is None:
                raise JobFileError(f"{where}: {_unknown(parent, keys)}")
            choices = next((each.choices for each in sweep.dimensions if each.key == parent), ())
            if choices and (never := [text for text in allowed if not _is_among(text, choices)]):
                raise JobFileError(f"{where}: {parent} is never {never[0]}: its values are {', '.join(choices)}")
    named = [(f"subjects.{name}", key) for name, group in sweep.section.subjects.items() for key in group]
    named += [(f"stages.{each.name}.vary", key) for each in sweep.stages for key in sweep.keys_of(each.vary)]
    for where, key in named:
        if key not in keys:
            raise JobFileError(f"{source}: sweep.{where}: {_unknown(key, [*keys, *sweep.section.subjects])}")
    if sweep.section.order == "in_turn" and not sweep.section.subjects:
        raise JobFileError(f'{source}: sweep.order = "in_turn" needs sweep.subjects')
    for stage in sweep.stages:
        parse_job(apply_overrides(sweep.table, stage.set), source=f"{source}: sweep.stages.{stage.name}.set")
    if "cmaes" in _samplers(sweep) and importlib.util.find_spec("cmaes") is None:
        raise UsageError('sweep.sampler: "cmaes" needs the package of that name: pip install cmaes')
    _check_values(sweep, source)


def _samplers(sweep: Sweep) -> set[str]:
    return {stage.sampler or sweep.section.sampler for stage in sweep.stages}


def _check_values(sweep: Sweep, source: str) -> None:
    """The job with each dimension alone first, so that each wrong key is told of once; then with the corners."""
    space = Space(sweep.dimensions, frozenset(each.key for each in sweep.dimensions), job_value=sweep.job_value)
    faults: list[str] = []
    for dimension in sweep.dimensions:
        try:
            parse_job(apply_overrides(sweep.table, [override(dimension.key, dimension.grid()[0])]), source=source)
        except JobFileError as error:
            faults += [line for line in str(error).splitlines() if "unknown key" in line]
    if faults:
        raise JobFileError("\n".join(dict.fromkeys(faults)))
    for values in space.corners():
        words = [override(key, value) for key, value in values.items()]
        try:
            parse_job(apply_overrides(sweep.table, words), source=source)
        except JobFileError as error:
            raise JobFileError(f"{error}\n{source}: sweep.dimensions: with {', '.join(words)}") from None


def _is_among(text: str, choices: Sequence[str]) -> bool:
    return any(is_same(toml_to_value(text), toml_to_value(choice)) for choice in choices)


def _unknown(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{name} is no dimension{hint}; there are {', '.join(valid)}"
