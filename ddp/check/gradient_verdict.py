"""From findings on all ranks to the verdict on a gradient, which names the parameters.

The bands are those that practice has (Stanford's CS231n notes): above 1e-2 a gradient is wrong, between that and 1e-4
it is suspect, up to 1e-4 it is right where the loss has kinks, and a smooth loss should reach 1e-7. Errors add up on
the way through a network, so ten layers get ten times as much.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

from ddp.check.differences import EXACT, RIGHT
from ddp.check.gradient_check import ParameterFinding
from ddp.check.verdicts import Verdict, finite, several

WRONG = 1e-2
SHALLOW, LOOSEST = 3, 10.0  # layers that get nothing, and what ten get
KINKED = ("Relu", "Elu", "MaxPool", "Abs", "Clamp", "Hardtanh", "Hardswish", "Threshold", "Amax", "Amin", "Maximum", "Minimum")  # fmt: skip


def looseness(layers: int) -> float:
    """What the bands are multiplied by: 1 up to three layers, 10 from ten on, evenly in the logarithm between."""
    share = min(max(layers - SHALLOW, 0) / (10 - SHALLOW), 1.0)
    return LOOSEST**share


def count_layers(model: nn.Module) -> int:
    """Modules that have a matrix or a kernel of their own."""
    return sum(any(each.dim() > 1 for each in module.parameters(recurse=False)) for module in model.modules())


def has_kinks(loss: Tensor) -> bool:
    """Whether what the loss was made by has a function whose slope jumps."""
    seen: set[object] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(name in node.name() for name in KINKED):
            return True
        waiting += [before for before, _ in node.next_functions]
    return False


def to_text(findings: Sequence[ParameterFinding]) -> str:
    """For the other ranks."""
    return json.dumps([asdict(finding) for finding in findings])


def from_text(text: str) -> list[ParameterFinding]:
    return [ParameterFinding(**{**each, "index": tuple(each["index"])}) for each in json.loads(text)]


def merged(ranks: Iterable[Sequence[ParameterFinding]]) -> list[ParameterFinding]:
    """One finding a parameter: all ranks' entries counted, the worst of them shown."""
    found: dict[str, ParameterFinding] = {}
    for finding in (each for findings in ranks for each in findings):
        before = found.get(finding.name)
        if before is None:
            found[finding.name] = finding
            continue
        worst = max(before, finding, key=lambda each: (each.judged > 0, each.error))
        sums = {key: getattr(before, key) + getattr(finding, key) for key in ("judged", "zeros", "kinks", "unresolved")}
        found[finding.name] = replace(worst, **sums)
    return list(found.values())


def gradient_verdict(check: str, findings: Sequence[ParameterFinding], *, layers: int, smooth: bool) -> Verdict:
    """The verdict on all parameters of a model with so many layers.

    Args:
        smooth: whether the loss has no kinks.
    """
    loose = looseness(layers)
    judged = [finding for finding in findings if finding.judged]
    figures = {
        "looseness": loose,
        "smooth": smooth,
        "parameters": [finite({**asdict(finding), "index": list(finding.index)}) for finding in findings],
    }
    if not judged:
        return Verdict(check, "warning", f"no entry could be judged: {_left_out(findings)}", _ADVICE_UNSEEN, figures)
    wrong = [each for each in judged if each.error > WRONG * loose]
    suspect = [each for each in judged if WRONG * loose >= each.error > RIGHT * loose]
    rough = [each for each in judged if RIGHT * loose >= each.error > EXACT * loose and each.resolved and smooth]
    for status, band, limit, advice in (
        ("failed", wrong, WRONG, _ADVICE_WRONG),
        ("warning", suspect, RIGHT, _ADVICE_SUSPECT),
        ("warning", rough, EXACT, _ADVICE_ROUGH),
    ):
        if band:
            return Verdict(check, status, _blame(band, judged, limit * loose), advice, figures)  # type: ignore[arg-type]
    worst = max(judged, key=lambda each: each.error)
    return Verdict(
        check, "ok", f"{_counts(findings)}; largest relative error {worst.error:.1e}, {worst.entry()}", "", figures
    )


def dead_verdict(findings: Sequence[ParameterFinding]) -> Verdict:
    """Whether each parameter gets some gradient."""
    check = "dead parameters"
    dead = [finding.name for finding in findings if finding.is_dead]
    figures = {"dead": dead}
    if dead:
        found = f"analytic and numeric gradient are zero in all entries looked at of {several(dead)}"
        return Verdict(check, "warning", found, _ADVICE_DEAD, figures)
    return Verdict(check, "ok", f"the gradient reaches each of {len(findings)} parameters", "", figures)


_ADVICE_WRONG = (
    "a backward is wrong: of the operations between the last parameter that is right and the first that is wrong, look at "
    "hand-written backwards, detach(), .data and in-place changes"
)
_ADVICE_SUSPECT = (
    "probably a wrong term or factor in a hand-written backward: too much for rounding in double precision"
)
_ADVICE_ROUGH = "more than a smooth loss should have: look for float32 inside the forward, or an approximate backward"
_ADVICE_UNSEEN = (
    "the differences tell nothing here: check again after other steps (--burn-in) or with a smooth activation"
)
_ADVICE_DEAD = (
    "units that no example switches on (smaller learning rate, other initialisation), a bias before BatchNorm (leave it "
    "out), or a part that these examples do not use (then fine)"
)


def _blame(band: Sequence[ParameterFinding], judged: Sequence[ParameterFinding], limit: float) -> str:
    worst = max(band, key=lambda each: each.error)
    right = [each.name for each in judged if each.error <= min(limit, RIGHT)]
    beside = f"; right in {several(right)}" if right else ""
    return (
        f"relative error {worst.error:.1e} in {worst.entry()} (analytic {worst.analytic:.4g}, numeric {worst.numeric:.4g}); "
        f"above {limit:.0e} in {len(band)} of {len(judged)} parameters: {several([each.name for each in band], 5)}{beside}"
    )


def _counts(findings: Sequence[ParameterFinding]) -> str:
    judged = sum(finding.judged for finding in findings)
    left_out = _left_out(findings)
    scaled = [finding.name for finding in findings if finding.scale != 1.0 and not finding.is_dead]
    told = [f"{judged} entries of {len(findings)} parameters"]
    told += [f"left out {left_out}"] if left_out else []
    told += [f"loss scaled up for {several(scaled)}, whose gradients are under 1e-10"] if scaled else []
    return ", ".join(told)


def _left_out(findings: Sequence[ParameterFinding]) -> str:
    kinks, unresolved = sum(each.kinks for each in findings), sum(each.unresolved for each in findings)
    told = [f"{kinks} at kinks"] if kinks else []
    return ", ".join([*told, f"{unresolved} lost in rounding"] if unresolved else told)
