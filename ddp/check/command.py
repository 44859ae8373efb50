"""The `check` command, as one process or on ranks. Imported by every command: what is heavy is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from ddp.command_options import AllowImport, AsJson, JobFile, Overrides
from ddp.errors import ChecksFailedError
from ddp.job import Job, check_import, load_job, redact
from ddp.ranked_command import ranked
from ddp.topology import Topology


def check(
    job_file: JobFile,
    overrides: Overrides = None,
    burn_in: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="STEPS", help="Steps of training before gradients are checked.")
    ] = 10,
    seconds: Annotated[
        float, typer.Option(min=1.0, max=1e6, help="Each of the checks that take long ends about then.")
    ] = 60.0,
    allow_import: AllowImport = None,
    as_json: AsJson = False,
) -> None:
    """Look for bugs before a long run: gradients, losses, inputs, ranks, speed. Ends with 1 where a check failed."""
    with ranked() as here:
        job = load_job(job_file, overrides or ())
        check_import(job.task, allow_import or ())
        check_job(job, here, burn_in=burn_in, seconds=seconds, allow_import=allow_import or (), as_json=as_json)


def check_job(
    job: Job,
    here: Topology,
    *,
    burn_in: int = 10,
    seconds: float = 60.0,
    allow_import: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Check `job` as one of its ranks; rank 0 prints, each line as soon as it is known. Collective.

    Raises:
        ChecksFailedError: on all ranks, after everything was printed.
        StoppedError: a signal came.
        UsageError: the job cannot run here.
    """
    from ddp.check.examination import examine, stop_if_asked
    from ddp.check.preparation import prepare
    from ddp.check.verdicts import Verdict, failed, summary, to_json
    from ddp.training.session import session

    verdicts: list[Verdict] = []
    with session(job, here, allow_import=allow_import) as opened:
        subject, trained = prepare(opened, steps=burn_in, seconds=seconds, allow_import=allow_import)
        stop_if_asked(opened.stop)
        for verdict in examine(subject, trained, allow_import):
            stop_if_asked(opened.stop)
            verdicts.append(verdict)
            if here.rank == 0 and not as_json:
                print(redact(verdict.line()), flush=True)
    if here.rank == 0:
        print(redact(to_json(verdicts)) if as_json else summary(verdicts), flush=True)
    if names := failed(verdicts):
        error = ChecksFailedError(f"{len(names)} of {len(verdicts)} checks failed: {', '.join(names)}")
        error.consequence = here.rank != 0  # one rank says it for all
        raise error
