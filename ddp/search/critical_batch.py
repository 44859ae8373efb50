"""A critical-batch search from its sweep file to its results: the loop that keeps the workers busy.

What a search is to do next follows from the trials in its database alone (`plan.py`, `pilot.py`), so it may end at any
moment and go on later: finished trials stay, and none is run twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ddp.errors import DdpError, StoppedError, UsageError
from ddp.search.pilot import choose_targets, wanted_pilots
from ddp.search.plan import hopeless_steps, wanted
from ddp.search.progress import SearchProgress
from ddp.search.request import Trial
from ddp.search.store import (
    DEFINITION,
    FILE_NAME,
    TrialResult,
    read_fact,
    read_trials,
    remove_failed,
    write_fact,
    write_trial,
)
from ddp.search.sweep_file import Sweep
from ddp.search.workers import Failed, Pool
from ddp.training.signals import StopRequest, stop_on_signals

logger = logging.getLogger("ddp.search")

POLL_SECONDS = 0.2  # between looks at whether a signal came
HOPELESS_FAILURES = 3  # trials that failed before any did not: something is wrong with all of them
TARGETS = "targets"  # a fact in the database

Plan = Callable[[Sequence[TrialResult]], list[Trial]]


def search(
    sweep: Sweep,
    *,
    resume: bool = False,
    workers: int | None = None,
    allow_import: Sequence[str] = (),
    stream: TextIO | None = None,
) -> Path:
    """Run the search to its end and write its results; returns its directory.

    Args:
        resume: go on with what is in the directory; trials that failed are tried again.
        workers: runs side by side; the sweep's own number, or one a core, where left out.
        stream: for progress; standard error where left out.

    Raises:
        UsageError: the job cannot be run, the directory holds another search, or one is running there.
        StoppedError: a signal asked for it; what has finished is kept.
        DdpError: all trials fail.
    """
    directory = sweep.directory
    path = directory / FILE_NAME
    with alone_in(directory):
        begun = any(trial.method != "branched" for trial in read_trials(path))
        refuse_to_mix(path, sweep, resume=resume, begun=begun)
        with (
            Pool(sweep, workers or sweep.section.workers, allow_import=allow_import) as pool,
            stop_on_signals() as stop,
            SearchProgress(stream) as progress,
        ):
            begin_or_go_on(path, sweep)
            loop = SearchLoop(pool, path, stop, progress, read_trials(path), sweep.job.optimizer.name)
            targets = _targets(loop, sweep, path)
            loop.complete(lambda done: wanted(sweep, targets, done), f"to {_list(targets)}", _expected(sweep))
        write_results(directory)
    return directory


def write_results(directory: Path) -> None:
    """result.json and report.html from the trials in the directory; the page where matplotlib is there."""
    from ddp.search.critical_batch_report import write_critical_batch_report
    from ddp.search.findings import write_result

    write_result(directory)
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no %s: it needs matplotlib, pip install -e '.[report]'", directory / "report.html")
    else:
        write_critical_batch_report(directory)


def _targets(loop: SearchLoop, sweep: Sweep, path: Path) -> tuple[float, ...]:
    """Those given, those chosen before, or those that pilot runs find now."""
    if sweep.section.targets != "auto":
        return sweep.section.targets
    chosen = read_fact(path, TARGETS)
    if chosen is None:
        loop.complete(lambda done: wanted_pilots(sweep, done), "pilot runs, for targets", 5)
        chosen = choose_targets(sweep, loop.done)
        write_fact(path, TARGETS, chosen)
    return tuple(chosen)


def targets_in(directory: Path) -> tuple[float, ...]:
    """Those of the sweep in `directory`, given or chosen; none where there is no sweep."""
    path = directory / FILE_NAME
    definition: dict[str, Any] = read_fact(path, DEFINITION) or {}
    given = definition.get("sweep", {}).get("targets", "auto")
    return tuple(read_fact(path, TARGETS) or ()) if given == "auto" else tuple(given)


@dataclass
class SearchLoop:
    """Keeps a pool busy with what a plan wants, and every result in the database."""

    pool: Pool
    path: Path
    stop: StopRequest
    progress: SearchProgress
    done: list[TrialResult]
    optimizer: str

    def complete(self, plan: Plan, what: str, expected: int) -> None:
        """Run what `plan` wants until it wants nothing more."""
        self.progress.begin(what, expected, self.pool.size)
        queue = plan(self.done)
        while queue or self.pool.running:
            self._start(queue)
            ended = self.pool.finished(POLL_SECONDS)
            for trial, outcome in ended:
                self._keep(trial, outcome)
            if self.stop.asked:
                raise StoppedError(
                    f"stopped by {self.stop.signal_name}: {len(self.done)} trials are kept in {self.path}; "
                    "go on with --resume"
                )
            if ended:
                queue = plan(self.done)
                self.pool.limit(self._hopeless_steps)
        self.progress.end()

    def _start(self, queue: Sequence[Trial]) -> None:
        running = {trial.key for trial in self.pool.running}
        waiting = [trial for trial in queue if trial.key not in running]
        for trial in waiting[: self.pool.idle]:
            self.pool.start(trial)

    def _hopeless_steps(self, trial: Trial) -> float:
        if trial.method != "sweep":
            return trial.hopeless_steps
        return hopeless_steps(self.done, trial.batch_size, trial.learning_rate, trial.seed)

    def _keep(self, trial: Trial, outcome: TrialResult | Failed) -> None:
        result = _failed(trial, self.optimizer, outcome.cause) if isinstance(outcome, Failed) else outcome
        write_trial(self.path, result)
        self.done.append(result)
        self.progress.trial(result)
        if len(self.done) >= HOPELESS_FAILURES and all(each.stopped_because == "failed" for each in self.done):
            raise DdpError(f"every trial so far failed, the last one: {result.cause}")


def _failed(trial: Trial, optimizer: str, cause: str) -> TrialResult:
    unknown = (math.nan,) * len(trial.targets)
    return TrialResult(
        optimizer=optimizer,
        batch_size=trial.batch_size,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        method=trial.method,
        targets=trial.targets,
        steps_to_target=unknown,
        examples_to_target=unknown,
        validation_loss_at_target=unknown,
        validation_metric_at_target=unknown,
        seconds=math.nan,
        seconds_per_step=math.nan,
        peak_memory_bytes=0,
        diverged=False,
        stopped_because="failed",
        curve=(),
        noise_plain=unknown,
        noise_preconditioned=unknown,
        cause=cause,
        multiple=trial.multiple,
        origin=trial.origin,
    )


def refuse_to_mix(path: Path, sweep: Sweep, *, resume: bool, begun: bool) -> None:
    """Check that this search may use the database at `path`; changes nothing there.

    Args:
        begun: whether there are trials already of the kind that is to be run.

    Raises:
        UsageError: there are and `resume` is not asked for, or the directory holds another search.
    """
    here: dict[str, Any] | None = read_fact(path, DEFINITION)
    if begun and not resume:
        raise UsageError(f"{path}: there is a search already; give --resume to go on, or another sweep.directory")
    if here is not None and here != sweep.definition():
        raise UsageError(
            f"{path}: was begun with another {difference(here, sweep.definition())}; results of two searches do not "
            "mix: restore that, or give another sweep.directory"
        )


def begin_or_go_on(path: Path, sweep: Sweep) -> None:
    """Write down what is searched, once it is known that it can be; trials that failed before are tried again."""
    if read_fact(path, DEFINITION) is None:
        write_fact(path, DEFINITION, sweep.definition())
    remove_failed(path)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The names of what differs, as in the file."""
    names: list[str] = []
    for table in sorted(old.keys() | new.keys()):
        before, after = old.get(table), new.get(table)
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted(before.keys() | after.keys())
            names += [f"{table}.{key}" for key in keys if before.get(key) != after.get(key)]
        elif before != after:
            names.append(table)
    return ", ".join(names)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which goes with the process; where locks are not to be had, trust the user.

    The directory is made where it is missing, and goes again if nothing came of the search.

    Raises:
        UsageError: a search is running there, or nothing can be written there.
    """
    try:
        missing = [each for each in (directory, *directory.parents) if not each.exists()]
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(directory / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"{directory}: results cannot be written there: {error.strerror}; give another sweep.directory"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{directory}: a search is running here already") from None
        except OSError:
            pass
        try:
            yield
        finally:
            if not (directory / FILE_NAME).exists():
                _remove_empty(directory, missing)


def _remove_empty(directory: Path, made: Sequence[Path]) -> None:
    """The lock and those of the directories `made`, innermost first, that hold nothing else."""
    with contextlib.suppress(OSError):
        (directory / "lock").unlink()
        for each in made:
            each.rmdir()


def _expected(sweep: Sweep) -> int:
    """Trials of an uneventful search: for the progress bar, which grows where there are more."""
    section = sweep.section
    if section.learning_rates != "auto":
        return len(section.batch_sizes) * len(section.learning_rates) * section.seeds
    return len(section.batch_sizes) * (2 + 5 * section.seeds)


def _list(targets: Sequence[float]) -> str:
    return "training loss " + ", ".join(f"{target:g}" for target in targets)
