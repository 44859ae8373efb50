"""Find a learning rate from a script and train a little with it: the test puts the model back, so nothing is lost.

    python examples/find_lr.py                                      # one process
    torchrun --nproc-per-node=2 examples/find_lr.py                 # two ranks, one decision

The same from the command line, with a plot: python -m ddp find-lr examples/digits.toml --set optimizer.name=sgd
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddp.job import Job, load_job
from ddp.lr_finder.range_test import find_learning_rate
from ddp.ranked_command import print_on_rank_0, ranked
from ddp.topology import Topology
from ddp.training.session import session
from ddp.transport.row import StepRow

STEPS = 46  # two epochs


def trained(job: Job, here: Topology) -> str:
    """What the test says, and the loss before and after some steps with what it recommends."""
    with session(job, here) as opened:
        found = find_learning_rate(opened)
        if found.recommended is None:
            return found.verdict
        trainer, steps = opened.trainer, opened.steps()
        trainer.course.rate.job = _with_rate(job, found.recommended)  # the schedule's peak from here on
        losses = [mean_loss(trainer.step(steps)) for _ in range(STEPS)]
    return f"{found.verdict}\nloss {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps at that rate"


def mean_loss(rows: Sequence[StepRow]) -> float:
    """Of a step, over the examples of all ranks."""
    return sum(row.loss_sum for row in rows) / sum(row.examples for row in rows)


def _with_rate(job: Job, rate: float) -> Job:
    return job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"learning_rate": rate})})


if __name__ == "__main__":
    with ranked() as place:
        digits = load_job(Path(__file__).with_name("digits.toml"), ["optimizer.name=sgd"])
        print_on_rank_0(f"{trained(digits, place)}\n", place)
