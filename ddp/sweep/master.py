"""The master of a sweep: starts trials, watches them, ends those that are hung or hopeless, and keeps what they came to.

It may end at any moment. Trials of a master that is gone are taken over by the next one, or by one beside it, and go
on from their last checkpoint; those that ended are not run again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from ddp.errors import DdpError, JobFileError, StoppedError, UsageError
from ddp.search.progress import SearchProgress
from ddp.sweep.findings import Findings, find, write_findings
from ddp.sweep.findings_text import trial_line
from ddp.sweep.fork_server import Ready
from ddp.sweep.job_of_trial import Setting, trial_job, write_job
from ddp.sweep.journal import Journal
from ddp.sweep.launching import ForkServer, Request, Running, kill_quietly, start_command
from ddp.sweep.opening import opened_directory
from ddp.sweep.planning import Planner, Work
from ddp.sweep.stages import Stage
from ddp.sweep.sweep_file import Sweep
from ddp.sweep.trials import Trial, TrialResult, ranked
from ddp.sweep.watching import FROM_OUTSIDE, Watched
from ddp.training.signals import StopRequest

logger = logging.getLogger("ddp.sweep")

KILL_SECONDS = 3.0  # for what was killed to be gone
LOOK_SECONDS = 0.1  # between looks at trials
SAME_SIGNAL_SECONDS = 1.0
WAIT_SECONDS = 0.5  # between looks at whether other masters' trials are done


@dataclass
class Master:
    """One process that runs trials of a sweep, beside others perhaps.

    Attributes:
        workers: trials side by side.
    """

    sweep: Sweep
    directory: Path
    journal: Journal
    planner: Planner
    server: ForkServer
    workers: int
    allow_import: Sequence[str]
    stop: StopRequest
    progress: SearchProgress
    watched: list[Watched] = field(default_factory=list)
    _ask_again_at: float = 0.0
    _shown: str = ""

    @property
    def setting(self) -> Setting:
        return Setting(self.server.ready.training_examples, self.workers, len(os.sched_getaffinity(0)))

    def run(self) -> None:
        """Until no trial of the sweep is left.

        Raises:
            StoppedError: a signal asked for it; all trials have stopped, and go on with --resume.
            DdpError: every trial fails, or a stage has nothing to go on from.
        """
        try:
            while not self.stop.asked:
                if self._start() == "done" and not self.watched:
                    self.progress.end()
                    return
                self._look()
                self.server.wait(LOOK_SECONDS)
            self._stop_all()
        finally:
            for each in self.watched:
                kill_quietly(each.running)
        raise StoppedError(
            f"stopped by {self.stop.signal_name}: trials that ended are kept in {self.directory}; go on with --resume"
        )

    def _start(self) -> str:
        """Fill idle workers; "done" where the planner has just said so."""
        while len(self.watched) < self.workers and time.monotonic() >= self._ask_again_at and not self.stop.asked:
            work = self.planner.next()
            if isinstance(work, str):
                self._ask_again_at = time.monotonic() + WAIT_SECONDS
                return work
            self._begin(work)
        return "busy"

    def _begin(self, work: Work) -> None:
        self._show(work.stage)
        stage, trial = work.stage, work.trial
        folder = self.directory / stage.name / f".{trial.name}"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        folder.mkdir(mode=0o700, parents=True)
        job_file = self.directory / stage.name / f"{trial.name}.toml"
        try:
            write_job(job_file, trial_job(self.sweep, stage, trial, self.setting))
        except JobFileError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._keep(trial, TrialResult("failed", f"no valid job: {error}"))
            return
        slot = min(set(range(self.workers)) - {each.slot for each in self.watched})
        job = self.sweep.job
        self.watched.append(
            Watched(
                stage=stage,
                trial=trial,
                running=self._started(trial, job_file, folder, slot),
                section=self.sweep.section,
                metric=job.evaluation.metric,
                goal=self.server.ready.goal,
                run_directory=trial.run_directory(self.directory),
                folder=folder,
                slot=slot,
            )
        )

    def _started(self, trial: Trial, job_file: Path, folder: Path, slot: int) -> Running:
        ranks = self.sweep.section.ranks
        admitted = [word for module in self.allow_import for word in ("--allow-import", module)]
        request = Request(
            name=f"{trial.stage}/{trial.name}",
            arguments=("train", str(job_file), "--resume", "auto", *admitted),
            outcome=(folder / "outcome.json").absolute(),
            log=job_file.with_suffix(".log"),
            devices=devices_of(slot, ranks, self.server.ready),
        )
        if starts_by_fork(self.sweep, self.server.ready):
            return self.server.start(request)
        return start_command(request, ranks)

    def _look(self) -> None:
        for each in list(self.watched):
            result = each.look(self.journal.report)
            if result is not None:
                self.watched.remove(each)
                if self._was_meant_too(result):
                    self.journal.note_spent(each.trial, each.seconds)
                else:
                    self._keep(each.trial, result)

    def _was_meant_too(self, result: TrialResult) -> bool:
        """A scheduler signals all processes of a job at once: a trial may have heard it a moment before this one."""
        if result.state == "failed" and result.cause.endswith(FROM_OUTSIDE):
            time.sleep(SAME_SIGNAL_SECONDS)
            return self.stop.asked
        return False

    def _keep(self, trial: Trial, result: TrialResult) -> None:
        self.journal.tell(trial, result)
        self._ask_again_at = 0.0
        self._forget_checkpoints(trial.stage)
        self.progress.finished(trial_line(replace(trial, result=result), self.sweep), failed=result.state == "failed")

    def _forget_checkpoints(self, stage: str) -> None:
        """Of trials that ended and are none of the best: a hundred models would fill the disk."""
        ended = ranked(self.journal.trials(stage))
        kept = [trial for trial in ended if trial.is_complete][: self.sweep.section.keep]
        for trial in ended:
            if trial not in kept:
                shutil.rmtree(trial.run_directory(self.directory) / "checkpoints", ignore_errors=True)

    def _show(self, stage: Stage) -> None:
        if stage.name != self._shown:
            plan = self.planner.plan(stage)
            ended = sum(trial.result is not None for trial in self.journal.trials(stage.name))
            if self._shown:
                self.progress.end()
            self.progress.begin(f"stage {stage.name}", (0 if plan is None else plan.trials) - ended, self.workers)
            self._shown = stage.name

    def _stop_all(self) -> None:
        """All trials save and stop. One that came to its end all the same is kept."""
        for each in self.watched:
            each.ask("stopped")
        until = time.monotonic() + self.sweep.section.stop_seconds + KILL_SECONDS
        while self.watched and time.monotonic() < until:
            for each in list(self.watched):
                if (result := each.look(lambda *_: False)) is None:
                    continue
                self.watched.remove(each)
                if result.state == "failed":
                    self.journal.note_spent(each.trial, each.seconds)
                else:
                    self._keep(each.trial, result)
            self.server.wait(LOOK_SECONDS)


def starts_by_fork(sweep: Sweep, ready: Ready) -> bool:
    """Whether trials are forks: of one rank, on a CPU, since a GPU does not survive one."""
    if sweep.section.start == "auto":
        return sweep.section.ranks == 1 and ready.device == "cpu"
    return sweep.section.start == "fork"


def devices_of(slot: int, ranks: int, ready: Ready) -> tuple[int, ...] | None:
    """The GPUs of a worker's trials; None on a CPU, and where there are too few for each worker to have its own."""
    mine = tuple(range(slot * ranks, (slot + 1) * ranks))
    return mine if ready.devices and mine[-1] < ready.devices else None


def default_workers(ranks: int, ready: Ready) -> int:
    """A core, or a GPU, for each rank."""
    return max(1, (ready.devices or len(os.sched_getaffinity(0))) // ranks)


def run_sweep(
    sweep: Sweep,
    stop: StopRequest,
    *,
    resume: bool = False,
    join: bool = False,
    workers: int | None = None,
    allow_import: Sequence[str] = (),
    stream: TextIO | None = None,
) -> Findings:
    """Run a sweep's trials until none is left, or take part in that; writes and returns what was found.

    Args:
        resume: go on with the sweep in the directory.
        join: likewise, or begin it, beside other masters.
        workers: trials side by side; the sweep's own number, or as many as the machine has cores for, where left out.

    Raises:
        UsageError: the job cannot run, or the directory holds another sweep, or one is running there.
        StoppedError, DdpError: see `Master.run`.
    """
    section, directory = sweep.section, sweep.directory
    if section.start == "fork" and section.ranks > 1:
        raise UsageError('sweep.start: "fork" is for trials of one rank; leave it out')
    with (
        opened_directory(sweep, resume=resume, join=join) as masters,
        ForkServer(sweep.job, section.ranks, allow_import, stop) as server,
        SearchProgress(stream) as progress,
    ):
        if starts_by_fork(sweep, server.ready) and server.ready.device != "cpu":
            raise UsageError('sweep.start: "fork" is for a CPU: a GPU does not survive one')
        journal = Journal(directory, section.pruner)
        planner = Planner(sweep, journal, masters, directory)
        many = workers or section.workers or default_workers(section.ranks, server.ready)
        try:
            Master(sweep, directory, journal, planner, server, many, allow_import, stop, progress).run()
        except DdpError:
            with contextlib.suppress(DdpError, OSError):  # what there is; the error is worth more
                write_results(find(sweep, journal, planner, server.ready.goal), directory)
            raise
        found = find(sweep, journal, planner, server.ready.goal)
        write_results(found, directory)
    return found


def write_results(found: Findings, directory: Path) -> None:
    """results.json, best.toml, and report.html where matplotlib is there to draw it; of all masters the last one's stay."""
    from ddp.sweep.page import write_sweep_page

    write_findings(found, directory)
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no %s: it needs matplotlib, pip install -e '.[report]'", directory / "report.html")
    else:
        write_sweep_page(found, directory / "report.html")
