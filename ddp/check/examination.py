"""All checks of one job, in order, on every rank: each rank its own examples, one verdict for all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from ddp.check.chance import CHANCE, check_chance_level
from ddp.check.gradients import (
    check_data_gradient,
    check_penalty_gradient,
    data_verdicts,
    first_line,
    penalty_verdict,
)
from ddp.check.matrix_rate import RATE, check_matrix_rate
from ddp.check.overfitting import OVERFIT, Overfitted, overfit, overfit_verdict
from ddp.check.ranks import Trained, check_data, check_data_set, check_weights
from ddp.check.stronger_regularisation import RAISES, check_stronger_regularisation
from ddp.check.structure import INPUTS, OUTPUT, check_inputs, check_output
from ddp.check.subject import Subject
from ddp.check.verdicts import Verdict
from ddp.errors import StoppedError
from ddp.training.agreement import gather_texts
from ddp.training.signals import StopRequest

logger = logging.getLogger("ddp.check")

BURN_IN = "first steps of training"
GRAVITY = ("failed", "warning", "ok", "skipped")


def examine(subject: Subject, trained: Trained, allow_import: Sequence[str] = ()) -> Iterator[Verdict]:
    """The verdicts, the same on all ranks, each as soon as it is there. Collective."""
    yield burn_in_verdict(trained)
    data = check_data_gradient(subject)
    verdict, dead = data_verdicts(subject, data)
    yield verdict
    yield dead
    right = verdict.status not in ("failed", "skipped")
    yield penalty_verdict(subject, check_penalty_gradient(subject), data, data_is_right=right)
    yield on_all_ranks(subject, CHANCE, lambda: check_chance_level(subject))
    done: list[Overfitted] = []
    yield on_all_ranks(subject, OVERFIT, lambda: _overfit(subject, done))
    yield on_all_ranks(subject, RAISES, lambda: _raise_regularisation(subject, done, allow_import))
    yield on_all_ranks(subject, INPUTS, lambda: check_inputs(subject))
    yield on_all_ranks(subject, OUTPUT, lambda: check_output(subject))
    yield check_weights(subject)
    yield check_data_set(subject)
    yield check_data(subject, trained)
    yield on_all_ranks(subject, RATE, lambda: check_matrix_rate(subject))


def stop_if_asked(stop: StopRequest) -> None:
    """End all ranks where a signal came to one. Collective.

    Raises:
        StoppedError: on all ranks.
    """
    asked = [name for name in gather_texts(stop.signal_name or "") if name]
    if asked:
        raise StoppedError(f"stopped by {asked[0]} before all was checked: run the check again")


def burn_in_verdict(trained: Trained) -> Verdict:
    """Whether training as the job has it begins at all."""
    if trained.fault:
        advice = "a smaller learning rate or warm-up; the checks that follow look at the weights as they were then"
        return Verdict(BURN_IN, "failed", trained.fault, advice, {"steps": trained.steps})
    return Verdict(
        BURN_IN, "ok", f"{trained.steps} steps taken, losses and gradients finite", "", {"steps": trained.steps}
    )


def on_all_ranks(subject: Subject, check: str, look: Callable[[], Verdict]) -> Verdict:
    """The gravest of the ranks' verdicts; a task's own error is one. Collective."""
    try:
        mine = look()
    except Exception as error:  # whatever the task raises: the other checks go on
        logger.debug("%s", check, exc_info=True)
        mine = Verdict(check, "failed", f"it raised {first_line(error)}", "the traceback shows in training")
    if subject.world_size == 1:
        return mine
    found = [Verdict(**each) for each in map(json.loads, gather_texts(json.dumps(asdict(mine))))]
    rank = min(range(len(found)), key=lambda each: GRAVITY.index(found[each].status))
    worst = found[rank]
    alike = all(each.status == worst.status for each in found)
    return worst if alike else replace(worst, found=f"rank {rank}: {worst.found}")


def _overfit(subject: Subject, done: list[Overfitted]) -> Verdict:
    done.append(overfit(subject))
    return overfit_verdict(done[0], len(subject.examples(20)))


def _raise_regularisation(subject: Subject, done: Sequence[Overfitted], allow_import: Sequence[str]) -> Verdict:
    if not done or not done[0].is_there:
        return Verdict(RAISES, "skipped", "it takes a model that fits 20 examples")
    return check_stronger_regularisation(subject, done[0], allow_import)
