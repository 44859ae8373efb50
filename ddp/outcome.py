"""How a run ended, as one small JSON file that launchers can trust. Loads no torch.

Launchers swallow exit codes (torchrun answers 1 for a worker's 75), so a rank that ends writes an `Outcome`:
where `launch` asked for it, and in the run directory. Ranks fail in droves, and the file must hold the cause:
the first rank with an error of its own wins; one that only lost its peer gives way to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ddp.errors import DdpError, StoppedError, UsageError

OUTCOME_FILE_VARIABLE = "DDP_OUTCOME_FILE"  # set by `launch` for the ranks it starts
STDERR_VARIABLE = "DDP_STDERR"  # likewise: where the user reads errors, while the launcher's own go to a file
FILE_NAME = "outcome.json"  # in the run directory
MOST_BYTES = 1 << 20  # that are read of one

_TYPES: Mapping[str, Any] = {
    "code": int,
    "rank": int,
    "world_size": int,
    "host": str,
    "step": int | None,
    "cause": str,
    "consequence": bool,
    "lost_rank": int | None,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended.

    Attributes:
        consequence: only because another rank failed, or was lost in a way that nobody saw.
        lost_rank: the rank without which it could not go on.
    """

    code: int
    rank: int
    world_size: int
    host: str
    step: int | None
    cause: str
    consequence: bool = False
    lost_rank: int | None = None

    @property
    def weight(self) -> int:
        """0 success, 1 a consequence, 2 a cause: what weighs more replaces what weighs less."""
        return 0 if self.code == 0 else 1 if self.consequence else 2

    def line(self) -> str:
        """The cause with where it was, for a person."""
        where = [f"rank {self.rank} on {self.host}"] if self.world_size > 1 else []
        where += [f"step {self.step}"] if self.step is not None else []
        return f"{', '.join(where)}: {self.cause}" if where else self.cause

    def message(self) -> str:
        """`line` as it is shown at the end; a stop that was asked for is no error."""
        return self.line() if self.code == StoppedError.exit_code else f"error: {self.line()}"


def success(rank: int, world_size: int, step: int | None = None) -> Outcome:
    """Training came to its end."""
    return Outcome(0, rank, world_size, socket.gethostname(), step, "done")


def failure(error: BaseException, rank: int, world_size: int, *, consequence: bool = False) -> Outcome:
    """What `error` ends this rank with; its step is the error's attribute `step`, where it has one."""
    expected = isinstance(error, DdpError)
    return Outcome(
        code=error.exit_code if expected else 1,
        rank=rank,
        world_size=world_size,
        host=socket.gethostname(),
        step=getattr(error, "step", None),
        cause=str(error) if expected else f"{type(error).__name__}: {error}".rstrip(": "),
        consequence=consequence or getattr(error, "consequence", False),
        lost_rank=getattr(error, "lost_rank", None),
    )


def annotate(error: BaseException, *, step: int | None = None, run_directory: Path | None = None) -> None:
    """Note on `error` where training was, for `failure` and for whoever writes the outcome. First note wins."""
    for name, value in (("step", step), ("run_directory", run_directory)):
        if value is not None and getattr(error, name, None) is None:
            setattr(error, name, value)


def claim(path: Path, outcome: Outcome) -> bool:
    """Write `outcome` unless `path` holds one of equal or more weight; whether it was written.

    A success followed by a failure becomes the failure, and a lost peer becomes that peer's own cause. Of
    several ranks with a cause, the first wins.
    """
    with _written_beside(path, outcome) as temporary:
        # Linking a finished file is atomic and fails where the name is taken: no reader sees half an outcome.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            return True
        held = read(path)
        if held is not None and held.weight >= outcome.weight:
            return False
        os.replace(temporary, path)
        return True


def correct(run_directory: Path, before: Outcome | None, final: Outcome) -> None:
    """Put `final` in the place of what an earlier attempt at the run left there, when the last one never came that far.

    Args:
        before: what was there before the first of these attempts: an end that was not theirs stays.
    """
    path = run_directory / FILE_NAME
    with contextlib.suppress(OSError):  # the exit code says it too
        status, held = run_directory.lstat(), read(path)
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not is_ours or held in (None, before, final) or final.code == UsageError.exit_code:
            return
        with _written_beside(path, final) as temporary:
            os.replace(temporary, path)


@contextlib.contextmanager
def _written_beside(path: Path, outcome: Outcome) -> Generator[Path]:
    temporary = path.with_name(f".{path.name}.{outcome.rank}.{os.getpid()}.{threading.get_ident()}")
    temporary.unlink(missing_ok=True)
    private = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(private, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def record(mine: Outcome, run_directory: Path | None) -> Path | None:
    """Claim the outcome files there are; the one that decides which rank's cause counts, None without any."""
    launched = os.environ.get(OUTCOME_FILE_VARIABLE)
    files = [Path(launched)] if launched else []
    if run_directory is not None and mine.code != UsageError.exit_code:  # that leaves nothing behind
        files.append(run_directory / FILE_NAME)
    for file in files:
        try:
            claim(file, mine)
        except OSError as error:  # a full disk must not hide the cause, nor make a failure of a success
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"warning: {file}: how this rank ended cannot be noted there: {error.strerror}\n")
    return files[0] if files else None


def read(path: Path) -> Outcome | None:
    """The outcome in `path`; None where there is none, or something else."""
    try:
        # A link leads out of the directory, and whoever opens a pipe waits.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            fields = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.keys() != _TYPES.keys():
        return None
    known = cast(dict[str, Any], fields)
    return Outcome(**known) if all(_is(known[name], kind) for name, kind in _TYPES.items()) else None


def _is(value: object, kind: Any) -> bool:
    """A true is a number to Python, and none in JSON."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def clear(run_directory: Path) -> None:
    """Forget how an earlier attempt at this run ended; for the rank that owns the directory, before it starts."""
    (run_directory / FILE_NAME).unlink(missing_ok=True)


def clear_launched() -> Outcome | None:
    """Likewise what an earlier attempt left where `launch` reads, which is returned; rank 0, before a restart's ranks meet."""
    if not (launched := os.environ.get(OUTCOME_FILE_VARIABLE)):
        return None
    file = Path(launched)
    before = read(file)
    for each in (file, *file.parent.glob(f"{file.name}.left.*")):
        each.unlink(missing_ok=True)
    return before


def meet(path: Path, rank: int, world_size: int, seconds: float) -> bool:
    """Whether all ranks have come here with the same `path`, at most `seconds` from now.

    Works before any process group and after its end, on one node: each rank leaves a mark beside `path`.
    """
    path.with_name(f"{path.name}.left.{rank}").touch()
    marks = [path.with_name(f"{path.name}.left.{other}") for other in range(world_size)]
    deadline = time.monotonic() + seconds
    while not all(mark.exists() for mark in marks):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
