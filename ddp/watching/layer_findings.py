"""What is off in the layers, from the latest looks at them.

The ratio of update to weight norm is to be about 1e-3 (Stanford CS231n, "Neural networks part 3"). Healthy runs lie a factor
of ten to both sides of it, small layers under Adam farther above: what is warned of is a factor of a hundred above, in most
layers, or of twenty below while the loss is still high.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ddp.watching.finding import Finding, listed
from ddp.watching.layers import LayerStatistics
from ddp.watching.look import ENOUGH_EXAMPLES

AIM = 1e-3
LARGEST_RATIO, SMALLEST_RATIO = 0.1, 5e-5
OVERTURNING = 0.5  # of the weights, in one step: one look is enough
HARDLY = 1e-3  # of the others' ratio: such a layer hardly moves
LOOKS = 2  # successive ones that must agree: looks are rare
MANY_UNITS = 1 / 3
SMALLEST_STD, LARGEST_STD = 1e-4, 1e3
VANISHED = 1e-4  # the first layer's gradient over the largest one
STILL_HIGH = 0.5  # of the loss at the start: what is learned slowly by then is slow, later it is done

Look = Sequence[LayerStatistics]


@dataclass(frozen=True, slots=True)
class Situation:
    """Where the run stands at the latest look.

    Attributes:
        loss_share: the loss now over that at the start; NaN where not known.
        rate_share: the learning rate now over the largest so far.
        rate_rises: it was less at the look before: warming up.
    """

    loss_share: float = math.nan
    rate_share: float = 1.0
    rate_rises: bool = False


def layer_findings(looks: Sequence[Look], situation: Situation) -> list[Finding]:
    """What the latest looks show, in order of time; the same layers in the same order in each."""
    if not looks:
        return []
    found = [*_dead(looks[-1]), *_saturated(looks[-1])]
    if median_ratio(looks[-1]) > OVERTURNING:
        found += _ratios(looks[-1:], situation)
    elif len(looks) >= LOOKS:
        latest = looks[-LOOKS:]
        found += [*_ratios(latest, situation), *_signals(latest), *_vanishing_gradients(latest, situation)]
    return found


def median_ratio(look: Look) -> float:
    """Over the layers; NaN where no layer has one."""
    ratios = [ratio for layer in look if math.isfinite(ratio := _ratio(layer))]
    return median(ratios) if ratios else math.nan


def _ratio(layer: LayerStatistics) -> float:
    """Without normalisations, whose scales begin at 1: however small other layers' weights are, theirs are not."""
    return math.nan if "Norm" in layer.kind else layer.update_ratio


def _ratios(looks: Sequence[Look], situation: Situation) -> list[Finding]:
    """Of the update to the weights: in most layers, then in single ones that hardly move."""
    lowest, highest = (_over_looks(looks, _ratio, over) for over in (min, max))
    if not lowest:
        return []
    low, high = median(lowest.values()), median(highest.values())
    if low > LARGEST_RATIO:
        return [_too_large(lowest, low)]
    slow = high / situation.rate_share < SMALLEST_RATIO and not situation.rate_rises
    if slow and situation.loss_share > STILL_HIGH:
        return [_too_small(high)]
    return _hardly_moving(highest, low)


def _too_large(by_layer: dict[str, float], middle: float) -> Finding:
    high = sorted((name for name, ratio in by_layer.items() if ratio > LARGEST_RATIO), key=lambda name: -by_layer[name])
    return Finding(
        "updates too large",
        f"a step changes the weights by {middle:.1g} of their norm, {middle / AIM:,.0f} times the usual 0.001 "
        f"({listed(high)}): the learning rate is too high; divide it by 10, warm it up, or look with find-lr",
    )


def _too_small(middle: float) -> Finding:
    times = f"{AIM / middle:,.0f} times less than the usual 0.001" if middle > 0 else "not at all"
    return Finding(
        "updates too small",
        f"a step changes the weights by {middle:.1g} of their norm, {times}, and the loss is still high: the learning rate is "
        "too low; multiply it by 10, or look with find-lr",
    )


def _hardly_moving(by_layer: dict[str, float], middle: float) -> list[Finding]:
    still = [name for name, ratio in by_layer.items() if ratio < HARDLY * middle]
    return [
        Finding(
            f"{name} hardly moves",
            f"a step changes its weights by {by_layer[name]:.1g} of their norm, in the median layer by {middle:.1g}: hardly any "
            "gradient arrives; look for dead or saturated units behind it, or freeze it",
        )
        for name in still
    ]


def _dead(look: Look) -> list[Finding]:
    return [
        Finding(
            f"dead units in {layer.name}",
            f"{_units(layer, layer.dead_units)} of {layer.called} were zero for all of the latest {layer.examples:,} examples and learn "
            "nothing: lower the learning rate, look at the biases before it, or take a leaky activation function",
        )
        for layer in look
        if layer.examples >= ENOUGH_EXAMPLES and layer.dead_share >= MANY_UNITS
    ]


def _saturated(look: Look) -> list[Finding]:
    return [
        Finding(
            f"saturated units in {layer.name}",
            f"{_units(layer, layer.saturated_units)} of {layer.called} stay near their limits, where the gradient vanishes: smaller "
            "initial weights (Xavier), standardised inputs, a normalisation before it, or ReLU",
        )
        for layer in look
        if not layer.is_output and layer.examples >= ENOUGH_EXAMPLES and layer.saturated_share >= MANY_UNITS
    ]


def _units(layer: LayerStatistics, count: int) -> str:
    if count == layer.units:
        return f"all {count:,} units"
    return f"{count:,} of {layer.units:,} units ({100 * count / layer.units:.0f} %)"


def _signals(looks: Sequence[Look]) -> list[Finding]:
    """Activations that are nearly nothing, or huge, in the first layer where they are; not in what the model gives."""
    spread = _over_looks(
        [[each for each in look if not each.is_output] for look in looks], lambda each: each.activation_std
    )
    for name, std in spread.items():
        if 0 < std < SMALLEST_STD:
            return [_signal("vanish", name, std, "larger initial weights (Kaiming before ReLU), or a normalisation")]
        if std > LARGEST_STD:
            return [
                _signal("explode", name, std, "standardise the inputs, smaller initial weights, or a normalisation")
            ]
    return []


def _signal(what: str, name: str, std: float, remedy: str) -> Finding:
    return Finding(f"activations {what}", f"from {name} on, where their standard deviation is {std:.1g}: {remedy}")


def _vanishing_gradients(looks: Sequence[Look], situation: Situation) -> list[Finding]:
    norms = _over_looks(looks, lambda layer: layer.gradient_norm)
    if len(norms) < 2 or not situation.loss_share > STILL_HIGH:
        return []
    first, largest = next(iter(norms)), max(norms, key=lambda name: norms[name])
    if norms[first] >= VANISHED * norms[largest]:
        return []
    return [
        Finding(
            "gradients vanish towards the input",
            f"their norm is {norms[first]:.1g} in {first} and {norms[largest]:.1g} in {largest}: another initialisation (Kaiming, "
            "Xavier), a normalisation, residual connections, or ReLU in place of tanh and sigmoid",
        )
    ]


def _over_looks(
    looks: Sequence[Look], value: Callable[[LayerStatistics], float], over: Callable[[list[float]], float] = median
) -> dict[str, float]:
    """Each layer's value `over` the looks, for layers that have one in all of them."""
    values: dict[str, list[float]] = {}
    for look in looks:
        for layer in look:
            if math.isfinite(found := value(layer)):
                values.setdefault(layer.name, []).append(found)
    return {name: over(each) for name, each in values.items() if len(each) == len(looks)}
