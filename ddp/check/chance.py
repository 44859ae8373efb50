"""The loss of a fresh model: that of guessing, log(classes), where outputs and labels tell the number of classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddp.check.determinism import without_dropout
from ddp.check.observing import Call, observe_call, tensors_in
from ddp.check.subject import Subject
from ddp.check.verdicts import Verdict
from ddp.tasks.base import Batch, Task
from ddp.training.random_state import preserved_random_state, seed_rank

CHANCE = "loss at chance level"
LOOKED_AT = 128  # examples of a rank
NEAR, FAR = 0.25, 2.0  # relative to the chance level: up to here it is well, and above there a failure
ADVICE_NOT_FINITE = "look for log or division by zero in the loss, and for examples that are not finite"


def check_chance_level(subject: Subject) -> Verdict:
    """The mean loss of the fresh model against log(classes), where outputs and labels tell the classes."""
    model = without_dropout(subject.initial)
    batch = subject.fetch(subject.examples(LOOKED_AT))
    with preserved_random_state(), torch.no_grad():
        seed_rank(subject.job.run.seed, subject.rank)
        call = observe_call(subject.plain_task, model, batch)
    loss = float(call.losses.double().mean())
    if not math.isfinite(loss):
        return Verdict(CHANCE, "failed", f"the loss at the start is {loss}", ADVICE_NOT_FINITE, {"loss": loss})
    classes, positions = count_classes(subject.plain_task, call, batch)
    if classes is None:
        found = f"no classes seen in outputs and labels; the loss at the start is {loss:.4g}"
        advice = "compare it with that of the best constant prediction; a task's attribute `classes` tells their number"
        return Verdict(CHANCE, "skipped", found, advice, {"loss": loss})
    chance = math.log(classes)
    if positions > 1 and abs(loss / positions - chance) < abs(loss - chance):
        chance *= positions
    figures = {"loss": loss, "classes": classes, "chance": chance}
    times = "" if chance == math.log(classes) else f"{positions} times "
    found = f"{loss:.4g} at the start; {times}log({classes}) is {chance:.4g}"
    off = loss / chance - 1
    if abs(off) <= NEAR:
        return Verdict(CHANCE, "ok", found, "", figures)
    status = "failed" if off > FAR else "warning"
    return Verdict(CHANCE, status, found, _ADVICE_HIGH if off > 0 else _ADVICE_LOW, figures)


_ADVICE_HIGH = (
    "the model starts out sure of wrong answers: smaller initial weights in the last layer, standardised inputs"
)
_ADVICE_LOW = (
    "the fresh model knows something already: pretrained weights, classes of very unequal size, or labels that leak into "
    "the inputs"
)


def count_classes(task: Task, call: Call, batch: Batch) -> tuple[int | None, int]:
    """Number of classes, None where nothing tells; and the predictions an example is asked for.

    The task's attribute `classes`, else the size of the outputs' class axis where the batch has whole numbers below it of
    the outputs' other axes (or an example at least), else two for one output an example and labels of zeros and ones.
    """
    declared = getattr(task, "classes", None)
    if not call.outputs:
        return (declared, 1) if isinstance(declared, int) and declared > 1 else (None, 1)
    outputs, examples = call.outputs[0], len(call.losses)
    if isinstance(declared, int) and declared > 1:
        return declared, max(outputs.numel() // max(examples * declared, 1), 1)
    values = [each for each in tensors_in(batch) if each.dim() and len(each) == examples and each.numel()]
    if not outputs.is_floating_point() or not outputs.dim() or len(outputs) != examples:
        return None, 1
    if outputs.numel() == examples:
        return (2, 1) if any(_is_zeros_and_ones(each, examples) for each in values) else (None, 1)
    labels = [
        each for each in values if not each.is_floating_point() and each.dtype != torch.bool and int(each.min()) >= 0
    ]
    for axis in (1, outputs.dim() - 1):
        shape = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
        if any(each.shape == shape and _are_classes(each, outputs.shape[axis]) for each in labels):
            return outputs.shape[axis], outputs.numel() // (examples * outputs.shape[axis])
    last = outputs.shape[-1]
    if outputs.dim() > 2 and any(each.dim() == outputs.dim() - 1 and _are_classes(each, last) for each in labels):
        return last, outputs.numel() // (examples * last)  # the next of a sequence: labels are made of the inputs
    return None, 1


def _are_classes(labels: Tensor, classes: int) -> bool:
    return int(labels.min()) < int(labels.max()) < classes


def _is_zeros_and_ones(labels: Tensor, examples: int) -> bool:
    return (
        labels.numel() == examples
        and bool(((labels == 0) | (labels == 1)).all())
        and bool(labels.min() != labels.max())
    )
