"""One attempt at a run among several: which run it goes on with, and what an earlier attempt left behind.

torchrun starts the ranks anew when one is lost, a scheduler the whole job; either counts its attempts. Where nobody
named the run, rank 0 notes its id in the directory that torchrun's agent keeps for its ranks as long as it lives: what
the rendezvous' store holds is not the same over restarts in every torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ddp import outcome
from ddp.errors import DivergedError
from ddp.job import RUN_ID_VARIABLE, Job, run_id_is_given
from ddp.topology import Topology

LOCK_PATIENCE_SECONDS = 10.0  # for the ranks of an earlier attempt to be quite gone
_NOTE = "ddp-run"
_REFUSED_NOTE = "ddp-refused"


def environment_of_the_run(job: Job, topology: Topology, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, with the id of the run that an earlier attempt began, where nothing else names it."""
    known = dict(environ)
    note = _note_file(environ)
    if topology.restarts and note is not None and not run_id_is_given(job.run.id, environ):
        with suppress(OSError):
            known[RUN_ID_VARIABLE] = note.read_text(encoding="utf-8")
    return known


def note_run(run_id: str, environ: Mapping[str, str]) -> None:
    """Let a later attempt know which run this one is; rank 0."""
    if (note := _note_file(environ)) is not None:
        with suppress(OSError):  # a restart then begins a new run
            note.write_text(run_id, encoding="utf-8")


def refuse_to_diverge_again(run_directory: Path, topology: Topology) -> None:
    """torchrun restarts after any code. The same numbers would lead to the same end, so that is said at once.

    Raises:
        DivergedError: the attempt before ended with one.
    """
    before = outcome.read(run_directory / outcome.FILE_NAME)
    if topology.launcher == "torchrun" and topology.restarts and before and before.code == DivergedError.exit_code:
        raise DivergedError(f"{before.cause} (in the attempt before; a restart would go the same way)")


def note_refused(environ: Mapping[str, str]) -> None:
    """Let later attempts know that the first one ended with a usage error, which would only be said again."""
    if (note := _note_file(environ, _REFUSED_NOTE)) is not None and not _is_restart(environ):
        with suppress(OSError):
            note.touch()


def was_refused(environ: Mapping[str, str]) -> bool:
    """Whether torchrun starts this rank again after a usage error of the first attempt."""
    note = _note_file(environ, _REFUSED_NOTE)
    return note is not None and _is_restart(environ) and note.exists()


def _is_restart(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _note_file(environ: Mapping[str, str], name: str = _NOTE) -> Path | None:
    """In the agent's own directory, RUN/attempt_N/LOCAL_RANK/error.json being what each rank is told of."""
    error_file = Path(environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if len(error_file.parts) < 4 or not error_file.is_absolute():
        return None
    return error_file.parents[2] / name
