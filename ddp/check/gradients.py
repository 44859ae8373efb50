"""The gradient checks of a job: the data's loss alone first, then what regularises by itself.

Together, a penalty that is much larger than the data's loss would hide an error of the latter. Every rank looks at
examples and entries of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ddp.check.determinism import PrecisionWatch, double_precision, seeded_loss, to_double, without_dropout
from ddp.check.differences import FIRST_STEPS
from ddp.check.gradient_check import ENTRIES, ParameterFinding, check_gradients
from ddp.check.gradient_verdict import (
    count_layers,
    dead_verdict,
    from_text,
    gradient_verdict,
    has_kinks,
    merged,
    to_text,
)
from ddp.check.subject import Subject
from ddp.check.threads import useful_threads
from ddp.check.verdicts import Verdict, several
from ddp.metering.measurement import has_batch_statistics
from ddp.tasks.base import Batch
from ddp.training.agreement import gather_texts

DATA, DEAD, PENALTY = "gradient", "dead parameters", "gradient of regularisation"
OVERWHELMS = 1.0  # norm of the penalty's gradient over that of the data's


@dataclass
class Checked:
    """What one rank has seen of one loss; `refusal` says why it saw nothing."""

    findings: list[ParameterFinding] = field(default_factory=list)
    smooth: bool = True
    refusal: str = ""
    norm: float = 0.0


def check_data_gradient(subject: Subject) -> Checked:
    """Of the task's loss without regularisation, on 2 examples, or 3 where batches are normalised."""

    def losses(model: nn.Module) -> Callable[[], Tensor]:
        return seeded_loss(subject.plain_task, model, _few(subject), subject.job.run.seed)

    return _check(subject, losses, entries=ENTRIES)


def check_penalty_gradient(subject: Subject) -> Checked | None:
    """Of what regularisation adds to the loss: the task's own terms, and half the weight decay times the squared norm.

    None where the job has nothing of that kind.
    """
    if subject.task is subject.plain_task and not subject.decay:
        return None

    def losses(model: nn.Module) -> Callable[[], Tensor]:
        batch = _few(subject)
        whole = seeded_loss(subject.task, model, batch, subject.job.run.seed)
        plain = seeded_loss(subject.plain_task, model, batch, subject.job.run.seed)
        decayed = [(subject.decay[name], each) for name, each in model.named_parameters() if name in subject.decay]

        def penalty() -> Tensor:
            total = torch.zeros((), device=subject.device)
            for decay, parameter in decayed:
                total = total + 0.5 * decay * parameter.square().sum()
            return total if subject.task is subject.plain_task else total + whole() - plain()

        return penalty

    return _check(subject, losses, entries=2)


def data_verdicts(subject: Subject, checked: Checked) -> list[Verdict]:
    """Of all ranks together: the gradient, and whether it reaches every parameter. Collective."""
    findings, smooth, refusal = _gathered(subject, checked)
    if refusal:
        return [Verdict(DATA, "skipped", refusal, _REFUSED), Verdict(DEAD, "skipped", "no gradient was checked")]
    found = _verdict(subject, DATA, findings, smooth)
    if has_batch_statistics(subject.model):
        found = replace(found, found=f"{found.found}; BatchNorm by the statistics of the examples, in every call alike")
    return [found, dead_verdict(findings)]


def penalty_verdict(subject: Subject, checked: Checked | None, data: Checked, *, data_is_right: bool) -> Verdict:
    """Of all ranks together; what the task adds is the difference of two losses, and needs the data's to be right. Collective."""
    if checked is None:
        return Verdict(
            PENALTY, "skipped", "the job has no weight decay, and nothing of its task that is known to regularise"
        )
    if not data_is_right and subject.task is not subject.plain_task:
        return Verdict(PENALTY, "skipped", "the gradient of the data's own loss is to be mended first")
    findings, smooth, refusal = _gathered(subject, checked)
    ratio = checked.norm / data.norm if data.norm else math.inf
    ratio = max(float(each) for each in _gather(subject, repr(ratio)))
    if refusal:
        return Verdict(PENALTY, "skipped", refusal, _REFUSED)
    verdict = _verdict(subject, PENALTY, findings, smooth)
    found = f"{verdict.found}; norm {ratio:.2g} of the data's gradient's"
    status, advice = verdict.status, verdict.advice
    if status == "ok" and ratio > OVERWHELMS and math.isfinite(ratio):
        status, advice = "warning", "it overwhelms the data's loss: lower weight decay or the task's own penalty"
    return Verdict(PENALTY, status, found, advice, {**verdict.figures, "norm_over_data_norm": ratio})


def _verdict(subject: Subject, check: str, findings: list[ParameterFinding], smooth: bool) -> Verdict:
    verdict = gradient_verdict(check, findings, layers=count_layers(subject.model), smooth=smooth)
    parameters = subject.model.named_parameters()
    trained = {name for name, each in parameters if each.requires_grad and each.is_floating_point()}
    missed = sorted(trained - {finding.name for finding in findings})
    if not missed:
        return verdict
    late = f"{verdict.found}; not looked at in {subject.seconds:g} s (--seconds): {several(missed)}"
    return replace(verdict, found=late, figures={**verdict.figures, "missed": missed})


_REFUSED = (
    "nothing is known of this gradient: let the forward take float64 and draw from torch's generators, then check again"
)


def _few(subject: Subject) -> Batch:
    """Two examples; three where batches are normalised: of two, values become +1 and -1 whatever the weights."""
    count = 3 if has_batch_statistics(subject.model) else 2
    return to_double(subject.fetch(subject.examples(count)))


def _check(subject: Subject, losses: Callable[[nn.Module], Callable[[], Tensor]], *, entries: int) -> Checked:
    """A task's forward may fail in any way in double precision: that is told, not raised."""
    try:
        with double_precision():
            model = without_dropout(subject.model).double()
            loss = losses(model)
            refusal, smooth = _refusal(loss)
            if refusal:
                return Checked(refusal=refusal)
            parameters = {
                name: each
                for name, each in model.named_parameters()
                if each.requires_grad and each.dtype == torch.float64
            }
            with useful_threads(loss):
                findings = check_gradients(
                    loss,
                    _from(parameters, subject.rank, subject.world_size),
                    seed=subject.rank,
                    entries=_affordable(loss, len(parameters), entries, subject.seconds),
                    asked_to_stop=subject.patience(),
                )
                return Checked(findings, smooth, norm=_norm(loss, list(parameters.values())))
    except Exception as error:  # whatever the task raises
        return Checked(refusal=f"the loss cannot be computed in double precision: {first_line(error)}")


def _refusal(loss: Callable[[], Tensor]) -> tuple[str, bool]:
    """Why differences of this loss would say nothing, if so; and whether it is smooth."""
    with PrecisionWatch() as watch:
        first = loss()
    if first.dtype != torch.float64 or watch.narrow:
        where = watch.narrow or f"the loss is {str(first.dtype).removeprefix('torch.')}"
        return f"the loss is not computed in double precision: {where}", True
    if not torch.isfinite(first):
        return f"the loss is {float(first.detach())}", True
    if not first.requires_grad:
        return "the loss does not depend on the parameters through autograd", True
    if float(first.detach()) != float(loss().detach()):
        return "the loss is another number each time it is computed, with all generators seeded alike", True
    return "", not has_kinks(first)


def _from(parameters: dict[str, nn.Parameter], rank: int, world_size: int) -> dict[str, nn.Parameter]:
    """The parameters in turn, each rank beginning at another: where time runs out, others have seen the rest."""
    names = list(parameters)
    start = len(names) * rank // world_size
    return {name: parameters[name] for name in names[start:] + names[:start]}


def _affordable(loss: Callable[[], Tensor], parameters: int, entries: int, seconds: float) -> int:
    """Entries of each parameter that can be looked at in the time, but two at least."""
    began = time.perf_counter()
    loss()
    entry_seconds = 2 * len(FIRST_STEPS) * (time.perf_counter() - began)
    return max(2, min(entries, int(seconds / (2 * entry_seconds * max(parameters, 1)))))


def _norm(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> float:
    gradients = [each for each in torch.autograd.grad(loss(), parameters, allow_unused=True) if each is not None]
    return math.sqrt(sum(float(each.to_dense().square().sum()) for each in gradients))


def _gathered(subject: Subject, checked: Checked) -> tuple[list[ParameterFinding], bool, str]:
    texts = _gather(subject, f"{int(checked.smooth)}{to_text(checked.findings)}")
    refusals = [each for each in _gather(subject, checked.refusal) if each]
    findings = merged([from_text(each[1:]) for each in texts])
    return findings, all(each[0] == "1" for each in texts), refusals[0] if refusals else ""


def _gather(subject: Subject, text: str) -> list[str]:
    return gather_texts(text) if subject.world_size > 1 else [text]


def first_line(error: BaseException) -> str:
    """An error's kind and the beginning of its text."""
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
