"""Small jobs for tests that start real ranks: a task that misbehaves on demand, and a way to run commands.

`write_job(folder, ...)` puts job.toml and misbehaving.py into `folder`; `run_command` runs there with a deadline
and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.submit import descendants

JOB = """
[run]
steps = {steps}
id = "run"
device = "cpu"

[task]
name = "misbehaving:Task"
options = {{ action = "{action}", rank = {rank}, step = {step} }}

[batch]
global_batch_size = 6
micro_batch_size = 6

[metrics]
enabled = false
"""

TASK = '''
"""Linear regression; in its `step`-th forward in training, rank `rank` does `action`."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ddp.tasks.base import TensorExamples


class Task:
    goals = {"accuracy": "max"}

    def __init__(self, action, rank, step):
        self.action, self.rank, self.step, self.count = action, rank, step, 0

    def model(self):
        return torch.nn.Linear(3, 1)

    def datasets(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(41, 3, generator=generator)
        data = TensorExamples(x, x.sum(dim=1, keepdim=True))
        return data, data

    def loss(self, model, batch):
        self.count += torch.is_grad_enabled()
        if self.count >= self.step and torch.is_grad_enabled():
            self.act()
        x, y = batch
        return (model(x) - y).square().sum(dim=1)

    def metrics(self, model, batch):
        return {"accuracy": -self.loss(model, batch)}

    def act(self):
        if self.action == "wait":
            Path(f"waiting-{dist.get_rank()}").write_text(str(os.getpid()))
            time.sleep(0.1)
        if dist.get_rank() != self.rank:
            return
        if self.action == "raise":
            raise ValueError("this is the cause")
        if self.action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
'''


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: a signal) and what it wrote."""

    code: int
    stdout: str
    stderr: str


def write_job(folder: Path, action: str = "none", rank: int = 1, step: int = 3, steps: int = 5) -> None:
    """Put job.toml and its task into `folder`: `action` is none, raise, die, or wait (slow steps, for signals)."""
    (folder / "job.toml").write_text(JOB.format(action=action, rank=rank, step=step, steps=steps))
    (folder / "misbehaving.py").write_text(TASK)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with one thread a rank and leave for Open MPI to run as root and on few cores."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":OVERSUBSCRIBE",
        **(extra or {}),
    }


@contextlib.contextmanager
def started(
    argv: Sequence[str], folder: Path, extra: Mapping[str, str] | None = None
) -> Generator[subprocess.Popen[str]]:
    """`argv` in `folder`, killed on the way out with everything below it."""
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment(extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        below = descendants(process.pid)  # ranks have sessions of their own
        process.kill()
        for each in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        process.wait(10)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def finish(process: subprocess.Popen[str], timeout: float = 90.0) -> Ended:
    """Wait for the end; the test fails past the deadline."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"still running after {timeout:g} s\n{error.stdout}\n{error.stderr}") from None
    return Ended(process.returncode, stdout, stderr)


def run_command(
    argv: Sequence[str], folder: Path, extra: Mapping[str, str] | None = None, timeout: float = 90.0
) -> Ended:
    with started(argv, folder, extra) as process:
        return finish(process, timeout)


def python(*arguments: str) -> list[str]:
    """The argv of this interpreter."""
    return [sys.executable, *arguments]


def beside_python(program: str) -> str:
    """The path of a program that is installed beside this interpreter."""
    return str(Path(sys.executable).with_name(program))


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Return once `condition()` is true; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def is_running(process_id: int) -> bool:
    """Whether there is such a process, and not only what is left of one."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
