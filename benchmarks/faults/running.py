"""Starts ranks in every way there is, and ends all that was started. Loads no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import warm
from faults.verdict import UnexpectedError
from faults.warm import WarmRanks
from launch.submit import descendants

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":OVERSUBSCRIBE",
}
LOOK_SECONDS = 0.02
OUTPUT, ERRORS = "stdout.txt", "stderr.txt"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code (negative: a signal), when, and what it wrote."""

    code: int
    unix_time: float
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"code {self.code}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks are started by what: "launch torchrun", "launch mpirun", "torchrun", "mpirun" or "warm"."""

    starter: str
    ranks: int
    restarts: int = 0
    resume: bool = False
    module: str = "faulty_task"  # that the job's task comes from

    def argv(self) -> list[str]:
        """The command, for a folder with job.toml."""
        count, python = str(self.ranks), sys.executable
        worker = ["-m", "ddp", *self.worker()]
        restarts = ["--max-restarts", str(self.restarts)] if self.restarts else []
        match self.starter.split():
            case ["launch", program]:
                return [
                    python,
                    "-m",
                    "launch",
                    program,
                    "job.toml",
                    "--nproc-per-node",
                    count,
                    *restarts,
                    *self._last(),
                ]
            case ["torchrun"]:
                agent = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
                return [*agent, *restarts, *worker]
            case _:
                return [str(Path(python).with_name("mpirun")), "-n", count, python, *worker]

    def worker(self) -> list[str]:
        """What a rank is told."""
        return ["train", "job.toml", *self._last()]

    def _last(self) -> list[str]:
        return [*(["--resume", "auto"] if self.resume else []), "--allow-import", self.module]


class Running:
    """A command that runs in a folder; its outputs go to files there, so that no pipe fills up."""

    def __init__(self, process: subprocess.Popen[bytes] | WarmRanks, folder: Path) -> None:
        self.process, self.folder = process, folder

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float) -> Ended:
        """Its end.

        Raises:
            UnexpectedError: it still runs after so many seconds; with what it wrote.
        """
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise UnexpectedError(f"still running after {seconds:g} s\n{self._ended(0)}") from None
        return self._ended(code)

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Until `condition()` is true, while the command runs.

        Raises:
            UnexpectedError: it took longer, or the command came to its end before.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            code = self.process.poll()
            if code is not None and not condition():
                raise UnexpectedError(f"the run ended before {what}\n{self._ended(code)}")
            if time.monotonic() > deadline:
                raise UnexpectedError(f"not within {seconds:g} s: {what}\n{self._ended(0)}")
            time.sleep(LOOK_SECONDS)

    def _ended(self, code: int) -> Ended:
        text = [(self.folder / name).read_text(errors="replace") for name in (OUTPUT, ERRORS)]
        return Ended(code, time.time(), *text)


@contextlib.contextmanager
def started(command: Ranks | Sequence[str], folder: Path) -> Generator[Running]:
    """`command` in `folder`; on the way out it is killed with everything below it and every process left in the folder."""
    process = _start(command, folder)
    try:
        yield Running(process, folder)
    finally:
        below = descendants(process.pid)
        if process.poll() is None:
            process.kill()
        kill_all([*below, *processes_in(folder)])
        process.wait(10)


def run(command: Ranks | Sequence[str], folder: Path, seconds: float = 120.0) -> Ended:
    """`command` to its end."""
    with started(command, folder) as running:
        return running.wait(seconds)


def _start(command: Ranks | Sequence[str], folder: Path) -> subprocess.Popen[bytes] | WarmRanks:
    for name in (OUTPUT, ERRORS):
        (folder / name).write_bytes(b"")
    if isinstance(command, Ranks) and command.starter == "warm":
        return warm.start(command.ranks, command.worker(), folder, ENVIRONMENT, [folder / OUTPUT, folder / ERRORS])
    # Both files are appended to: `launch` lets the ranks open the second one themselves.
    with (folder / OUTPUT).open("ab") as stdout, (folder / ERRORS).open("ab") as stderr:
        return subprocess.Popen(
            command.argv() if isinstance(command, Ranks) else command,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def end_in_order() -> None:
    """A signal to this process to stop it unwinds it, so that what it started ends too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))


def processes_in(folder: Path) -> list[int]:
    """Ids of the processes that work in `folder`: ranks may have lost whoever started them."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "cwd") == str(folder.resolve()) and _state(int(entry.name)) not in "ZX":
                    found.append(int(entry.name))
    return found


def kill_all(process_ids: Sequence[int]) -> None:
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


def _state(process_id: int) -> str:
    return Path(f"/proc/{process_id}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
