"""A `Finding` in words: for the terminal, and for the report."""

from __future__ import annotations

from ddp.noise.estimate import Estimate
from ddp.search.findings import Finding
from ddp.telemetry.progress import number_text


def in_words(finding: Finding) -> str:
    """What was found, for which optimizer and target, in a few sentences."""
    return " ".join(part for part in (_value(finding), _check(finding), _compared(finding), _harmless(finding)) if part)


def estimate_text(estimate: Estimate) -> str:
    """Value and interval, such as `62 [55, 71]`."""
    return f"{number_text(estimate.value)} [{number_text(estimate.low)}, {number_text(estimate.high)}]"


def _value(finding: Finding) -> str:
    fit = finding.fit
    start = f"{finding.name}{_where(finding)}:"
    if fit.critical_batch_size is None:
        return f"{start} no critical batch size, because {fit.reason}."
    assert fit.smallest_steps is not None and fit.smallest_examples is not None
    sizes = sum(best.interior or finding.method == "branched" for best in fit.best)
    return (
        f"{start} the critical batch size is {estimate_text(fit.critical_batch_size)} examples "
        f"({100 * fit.confidence:.0f} % interval; {sizes} batch sizes, {finding.runs} runs). A huge batch would take "
        f"{estimate_text(fit.smallest_steps)} steps, a tiny one {estimate_text(fit.smallest_examples)} examples."
    )


def _where(finding: Finding) -> str:
    return f", from {finding.origin}" if finding.method == "branched" else ""


def _check(finding: Finding) -> str:
    """Whether the model behind the value holds."""
    exponent = finding.fit.exponent
    if exponent is None or finding.fit.critical_batch_size is None:
        return ""
    value = f"{exponent.value:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]"
    verdict = "the hyperbola holds" if finding.fit.hyperbola_holds else "the hyperbola does not quite hold"
    return f"With a free exponent it is {value} where the model has 1: {verdict}."


def _compared(finding: Finding) -> str:
    measured, parts = finding.fit.critical_batch_size, []
    for name, predicted in (("plain", finding.predicted_plain), ("preconditioned", finding.predicted_preconditioned)):
        if predicted is not None:
            text = f"{estimate_text(predicted)} ({name})"
            parts.append(text if measured is None else f"{text}, {predicted.value / measured.value:.2g} times that")
    if not parts:
        return ""
    return f"The noise scale on the way predicted {' and '.join(parts)}; in brackets its range over batch sizes."


def _harmless(finding: Finding) -> str:
    harmless = finding.harmless
    if harmless is None:
        return ""
    base = number_text(harmless.base)
    meaning = f"examples to the target shown to be at most {harmless.margin:g} times those at {base}"
    if harmless.batch_size is None:
        return f"No batch size above {base} is shown to do no harm ({meaning})."
    more = ", the largest tried" if harmless.at_least else ""
    return f"The largest batch that does no harm is {number_text(harmless.batch_size)}{more} ({meaning})."
