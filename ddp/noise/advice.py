"""What a reading would mean for the batch size, in one sentence of plain words.

The model behind it is McCandlish et al. 2018 (arXiv:1812.06162, equation 2.11): with the noise scale B, a run at
a global batch of b examples needs S = S_min (1 + B/b) steps and E = E_min (1 + b/B) examples. It can be
far off, and the batch size at which a run really stops gaining depends on optimizer and target and is
only ever measured by runs; so the sentence says what would follow *if the model holds*.
"""

from __future__ import annotations

import math

from ddp.noise.efficiency import step_efficiency
from ddp.noise.noise_scale import SMALLEST_WINDOW, Reading
from ddp.noise.readings import Method, Metric

METRICS: dict[Metric, str] = {"plain": "", "preconditioned": " in Adam's metric"}
METHODS: dict[Method, str] = {
    "ranks": "",
    "micro_batches": ", from micro-batches",
    "split": ", from halves of batches",
    "none": "",
}


def advise(
    reading: Reading,
    global_batch_size: int,
    when: str = "",
    metric: Metric = "plain",
    method: Method = "ranks",
    sampled: str = "",
) -> str:
    """One or two sentences about `reading`, taken at `global_batch_size` examples a step.

    `when` names the moment in the caller's words, such as "epoch 3.0" or "step 80"; `metric` and `method` say what
    was measured and from what, `sampled` of which distribution, where that is not the training set. Only a resolved reading gives advice, a lower bound an "at least"; the other states
    are told in words.
    """
    where = f"{_where(global_batch_size, when)} the noise scale{f' of {sampled}' * bool(sampled)}{METRICS[metric]}"
    match reading.state:
        case "unresolved":
            return _unresolved(reading, where)
        case "beyond_data":
            return _beyond_data(reading, where)
        case "lower_bound":
            return _lower_bound(reading, where, global_batch_size)
        case "wide":
            return _wide(reading, where)
        case "resolved":
            return _resolved(reading, where, global_batch_size, METHODS[method])


def stands(earlier: Reading, latest: Reading, *, same_metric: bool) -> bool:
    """Whether what `earlier` resolved may still be the noise scale, as far as `latest` tells.

    In another metric it cannot be compared, and does not stand against a reading that says anything.
    """
    if latest.state == "unresolved":
        return True
    return same_metric and latest.state != "beyond_data" and latest.low <= earlier.noise_scale <= latest.high


def _unresolved(reading: Reading, where: str) -> str:
    if not reading.observations:
        return (
            "The noise scale is not measured: that takes at least two ranks or micro-batches with examples in the "
            "same step, or one batch that may be split."
        )
    if reading.window < SMALLEST_WINDOW:
        return f"{where} is not resolved yet: {reading.window} of {SMALLEST_WINDOW} observations."
    return (
        f"{where} is not resolved: over {reading.window} observations the gradient cannot be told "
        f"from its noise.{_outlook(reading)}"
    )


def _beyond_data(reading: Reading, where: str) -> str:
    return (
        "The gradient is mostly noise: the training set is nearly fitted. A larger batch is not what is missing. "
        f"({where} is above {_number(reading.low)}, more examples than the training set has.)"
    )


def _lower_bound(reading: Reading, where: str, global_batch_size: int) -> str:
    fewer_steps, more_examples = _doubling(reading.low, global_batch_size)
    return (
        f"{where} is at least {_number(reading.low)}. If the model holds here, doubling the batch "
        f"would take at least {_percent(fewer_steps)} % fewer steps and at most {_percent(more_examples)} % more "
        f"examples.{_outlook(reading)}"
    )


def _wide(reading: Reading, where: str) -> str:
    return (
        f"{where} is between {_number(reading.low)} and {_number(reading.high)}, too wide a range "
        f"for advice.{_outlook(reading)}"
    )


def _resolved(reading: Reading, where: str, global_batch_size: int, source: str) -> str:
    steps_low, examples_high = _doubling(reading.low, global_batch_size)
    steps_high, examples_low = _doubling(reading.high, global_batch_size)
    drifting = f", the mean of {reading.window} observations over which it moved" if reading.drifting else ""
    return (
        f"{where} is {_number(reading.noise_scale)} ("
        f"{_number(reading.low)}-{_number(reading.high)}{source}){drifting}. If the model holds here, doubling the batch "
        f"would take {_range(steps_low, steps_high)} % fewer steps and {_range(examples_low, examples_high)} % more "
        "examples."
    )


def _doubling(noise_scale: float, global_batch_size: int) -> tuple[float, float]:
    """Fewer steps and more examples at 2b than at b, as shares of those at b.

    With s = 1/(1 + B/b): 1 - S(2b)/S(b) = (1 - s)/2 and E(2b)/E(b) - 1 = s.
    """
    share = step_efficiency(noise_scale, global_batch_size)
    return (1.0 - share) / 2, share


def _where(global_batch_size: int, when: str) -> str:
    examples = f"{global_batch_size:,} example{'s' if global_batch_size > 1 else ''} a step"
    return f"At {when}, with {examples}," if when else f"At {examples}"


def _outlook(reading: Reading) -> str:
    """What it would take to resolve the reading, where that is known."""
    needed = reading.steps_needed
    if needed == math.inf:
        return " More steps of this kind would hardly resolve it; more ranks or micro-batches a step would help."
    more = "one more observation" if needed == 1 else f"{needed:.0f} more observations"
    return f" About {more} would resolve it at the present rate." if needed > 0 else ""


def _number(examples: float) -> str:
    if examples == math.inf:
        return "infinite"
    return f"{examples:,.0f}" if examples >= 9.5 else f"{examples:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _range(low: float, high: float) -> str:
    ends = _percent(low), _percent(high)
    return ends[0] if ends[0] == ends[1] else "-".join(ends)
