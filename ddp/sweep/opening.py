"""A sweep's directory: made, or found to hold the same sweep, and who works in it.

sweeps/<name>/
  sweep.json             what is searched, which may not change
  journal.log            Optuna's, see `journal`
  masters/               a locked file for each master that runs
  <stage>/trial-0007/    a run's directory; beside it the trial's job .toml and its .log
  results.json, best.toml, report.html
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ddp.errors import DdpError, UsageError
from ddp.search.critical_batch import difference
from ddp.sweep.locks import PLANNING_LOCK, FileLock, Masters, held
from ddp.sweep.stages import expand
from ddp.sweep.sweep_file import Sweep
from ddp.telemetry.page_file import replace_file

DEFINITION = "sweep.json"


@contextlib.contextmanager
def opened_directory(sweep: Sweep, *, resume: bool, join: bool) -> Iterator[Masters]:
    """The directory, made or found as it has to be, with this master among those there; an empty one goes again."""
    directory = sweep.directory
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        with _entered(sweep, resume=resume, join=join) as masters:
            yield masters
    except OSError as error:  # while trials run
        raise DdpError(
            f"{error.filename or directory}: {error.strerror or error}; the trials that ended are kept: go on with --resume "
            "once the cause is gone"
        ) from None
    finally:
        if not any((directory / each.name).exists() for each in expand(sweep)) and missing:
            _remove_empty(directory, missing)


@contextlib.contextmanager
def _entered(sweep: Sweep, *, resume: bool, join: bool) -> Iterator[Masters]:
    with contextlib.ExitStack() as stack:
        try:
            sweep.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with held(FileLock(sweep.directory / PLANNING_LOCK)):  # who looks for gone masters meets none half-way in
                masters = stack.enter_context(Masters(sweep.directory))
                _check_directory(sweep, masters, resume=resume, join=join)
        except OSError as error:
            raise UsageError(
                f"{error.filename or sweep.directory}: {error.strerror}; give another sweep.directory"
            ) from None
        yield masters


def _check_directory(sweep: Sweep, masters: Masters, *, resume: bool, join: bool) -> None:
    path = sweep.directory / DEFINITION
    others = masters.others()
    if path.exists():
        if not (resume or join):
            raise UsageError(f"{path}: there is a sweep already; give --resume to go on, or another sweep.directory")
        _check_same(path, sweep)
    if others and not join:
        raise UsageError(f"{sweep.directory}: is run by {', '.join(others)}; give --join to work beside it")
    if not path.exists():
        replace_file(path, json.dumps(sweep.definition(), indent=1))


def _check_same(path: Path, sweep: Sweep) -> None:
    try:
        here = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a sweep: {error}") from None
    now = json.loads(json.dumps(sweep.definition()))
    if here != now:
        raise UsageError(
            f"{path}: was begun with another {difference(_flat(here), _flat(now))}; results of two sweeps do not mix: "
            "restore that, or give another sweep.directory"
        )


def _flat(definition: object) -> dict[str, object]:
    """The sweep's tables and the job's in one, as `difference` compares them."""
    if not isinstance(definition, dict):
        return {}
    job = definition.get("job")
    return {"sweep": definition.get("sweep"), **(job if isinstance(job, dict) else {})}


def _remove_empty(directory: Path, made: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        (directory / "masters").rmdir()  # not where another master has just come
        for each in directory.iterdir():
            each.unlink()
        for each in made:
            each.rmdir()
