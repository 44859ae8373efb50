"""A job in which one rank is killed, stopped, or hangs as it enters a phase of a step."""

from __future__ import annotations

from pathlib import Path

JOB = """
[run]
steps = {steps}
device = "cpu"
{run_id}

[task]
name = "losing:Task"
options = {{ action = "{action}", rank = {rank}, phase = "{phase}", step = {step} }}

[batch]
global_batch_size = 14
micro_batch_size = 4

[evaluation]
every_steps = 4

[checkpoint]
every_steps = 2

[transport]
name = "{transport}"
timeout_seconds = {timeout_seconds}

[metrics]
enabled = false
"""

TASK = '''
"""Classification with normalisation; `rank` does `action` as it enters `phase` of `step`, in the first attempt."""

import os
import signal
import time
from pathlib import Path

import torch
from ddp.board import PhaseBoard
from ddp.tasks.base import TensorExamples
from ddp.topology import from_environment


class Task:
    goals = {"accuracy": "max"}

    def __init__(self, action, rank, phase, step):
        if from_environment(os.environ).rank != rank or Path("acted").exists() or action == "none":
            return
        if phase == "set-up":
            act(action)
        for name in ("enter", "interrupt"):
            setattr(PhaseBoard, name, acting(getattr(PhaseBoard, name), action, phase, step))

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.25), torch.nn.Linear(5, 1))

    def datasets(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(42, 3, generator=generator)
        data = TensorExamples(x, x.sum(dim=1, keepdim=True))
        return data, data

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().sum(dim=1)

    def metrics(self, model, batch):
        return {"accuracy": -self.loss(model, batch)}


def acting(method, action, phase, step):
    def act_there(board, *entered, **named):
        result = method(board, *entered, **named)
        if (board.position.phase, board.position.step) == (phase, step) and not Path("acted").exists():
            act(action)
        return result

    return act_there


def act(action):
    Path("acted").write_text(str(os.getpid()))
    if action == "raise":
        raise ValueError("this is the cause")
    if action == "hang":
        time.sleep(300)
    os.kill(os.getpid(), {"die": signal.SIGKILL, "stop": signal.SIGSTOP}[action])
'''


def write_losing_job(
    folder: Path,
    phase: str,
    step: int = 3,
    *,
    action: str = "die",
    rank: int = 1,
    transport: str = "auto",
    timeout_seconds: float = 60,
    steps: int = 6,
    run_id: str | None = "run",
) -> None:
    """Put job.toml and its task into `folder`; `action` is die, stop, hang, raise or none."""
    text = JOB.format(
        action=action,
        rank=rank,
        phase=phase,
        step=step,
        transport=transport,
        timeout_seconds=timeout_seconds,
        steps=steps,
        run_id=f'id = "{run_id}"' if run_id else "",
    )
    (folder / "job.toml").write_text(text)
    (folder / "losing.py").write_text(TASK)
