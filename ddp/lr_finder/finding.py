"""What a test found, for people and for programs: the suggestions of its passes, and what to do where there are none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ddp.lr_finder.curve import Curve, Features, Kind, middle

Rate = float | None


@dataclass(frozen=True, slots=True)
class RangePass:
    """One pass of a test: meant to have `steps` rates from `low` to `high`, and ended where its curve does."""

    low: float
    high: float
    steps: int
    curve: Curve
    features: Features

    @property
    def steps_per_e(self) -> float:
        """Steps to a factor of e."""
        return (self.steps - 1) / math.log(self.high / self.low)


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of a learning-rate range test; the same on all ranks. Rates are values of optimizer.learning_rate.

    Attributes:
        passes: the coarse one, and the zoomed one where it found something to look at.
        optimizer: its name in the job.
        learning_rate: the job's own.
        global_batch_size: in examples; the suggestions are for it.
        batch_factor: of the rates as the optimizer saw them over these, by the rule of the job for its batch size.
        epochs: passes through the training set in the longest pass; 0 of a stream that does not say how long it is.
    """

    passes: tuple[RangePass, ...]
    optimizer: str
    learning_rate: float
    global_batch_size: int
    batch_factor: float = 1.0
    epochs: float = 0.0

    @property
    def kind(self) -> Kind:
        """Of the coarse pass: the zoomed one refines what that found."""
        return self.passes[0].features.kind

    @property
    def finest(self) -> RangePass:
        """The last pass that saw the loss come down; the first where none did."""
        saw = [each for each in self.passes if each.features.kind in ("found", "open")]
        return saw[-1] if saw else self.passes[0]

    @property
    def steepest(self) -> Rate:
        """Where the smoothed loss falls fastest over the logarithm of the rate."""
        return _known(self.finest.features.steepest)

    @property
    def half_way(self) -> Rate:
        """Where the smoothed loss is half-way down from where it was to its minimum."""
        return _known(self.finest.features.half_way)

    @property
    def half_way_up(self) -> Rate:
        """Where half of that is lost again, in the last pass that saw it."""
        seen = [each.features.half_way_up for each in self.passes if math.isfinite(each.features.half_way_up)]
        return seen[-1] if seen else None

    @property
    def recommended(self) -> Rate:
        """The middle between half-way down and half-way up, see `curve`; half-way down where it never came up."""
        down, up = self.half_way, self.half_way_up
        return down if down is None or up is None else middle(down, up, self.finest.steps_per_e)

    @property
    def setting(self) -> str | None:
        """What to give to `train` to use it."""
        return None if self.recommended is None else f"--set optimizer.learning_rate={rate_text(self.recommended)}"

    @property
    def verdict(self) -> str:
        """One paragraph: what happened, and what to do."""
        first = self.passes[0]
        low, high = rate_text(first.low), rate_text(first.curve.rates[-1] if first.curve.rates else first.high)
        match self.kind:
            case "found":
                return (
                    f"Recommended: a learning rate of {_text(self.recommended)}, in the middle between {_text(self.half_way)}, "
                    f"where the loss is half-way down, and {_text(self.half_way_up)}, where half of that is lost again. "
                    f"It falls fastest at {_text(self.steepest)}."
                )
            case "open":
                return (
                    f"Recommended, with care: {_text(self.recommended)}, where the loss is half-way down; it falls fastest "
                    f"at {_text(self.steepest)}. It had not come up again at {high}, so the best rate may be "
                    f"higher: test on with --to {rate_text(100 * float(high))}."
                )
            case "flat":
                return f"No suggestion: {self._why_flat(low, high)}"
            case "rises at once":
                return (
                    f"No suggestion: the loss blows up after {len(first.curve.losses)} steps from {low} on, before it has come "
                    f"down. Begin lower: --from {rate_text(1e-4 * first.low)}."
                )
            case "not finite":
                return f"No suggestion: {self._why_not_finite(high)}"

    def _why_not_finite(self, high: str) -> str:
        steps = len(self.passes[0].curve.losses)
        look = "look for bad values in the data, the initialisation or the loss"
        if not steps:
            return f"the loss or its gradient is not finite in the first step, before any update: no rate is at fault; {look}."
        lower = rate_text(1e-4 * self.passes[0].low)
        return (
            f"the loss or its gradient is not finite in step {steps + 1}, at a rate of {high}, all of a sudden and before the "
            f"loss has come down: {look}, or begin lower, --from {lower}."
        )

    def _why_flat(self, low: str, high: str) -> str:
        found = self.passes[0].features
        noise = "" if found.baseline is None else f" (one step's loss varies by {found.baseline.noise:.2g})"
        end = f" It blows up at {rate_text(found.blow_up)}: stay well below." if math.isfinite(found.blow_up) else ""
        return (
            f"from {low} to {high} the loss does not come down by more than its noise{noise}.{end} Take more steps "
            "(--steps), a larger batch (--set batch.global_batch_size=...) or another range (--from, --to)."
        )


def rate_text(rate: float) -> str:
    """Two digits: a range test knows no more."""
    return f"{rate:.2g}"


def to_json(found: Finding) -> dict[str, Any]:
    """Plain values; what is not known is None."""
    return {
        "kind": found.kind,
        "recommended": found.recommended,
        "steepest": found.steepest,
        "half_way": found.half_way,
        "half_way_up": found.half_way_up,
        "setting": found.setting,
        "verdict": found.verdict,
        "optimizer": found.optimizer,
        "learning_rate": found.learning_rate,
        "global_batch_size": found.global_batch_size,
        "batch_factor": found.batch_factor,
        "epochs": found.epochs,
        "passes": [_pass_json(each) for each in found.passes],
    }


def _pass_json(each: RangePass) -> dict[str, Any]:
    names = ("kind", "start", "steepest", "half_way", "minimum", "half_way_up", "blow_up")
    values = {name: getattr(each.features, name) for name in names}
    return {
        "low": each.low,
        "high": each.high,
        "steps": each.steps,
        "end": each.curve.end,
        **{name: _known(value) if isinstance(value, float) else value for name, value in values.items()},
        "rates": list(each.curve.rates),
        "losses": list(each.curve.losses),
        "smoothed": list(each.features.smoothed),
    }


def _known(value: float) -> Rate:
    return value if math.isfinite(value) else None


def _text(rate: Rate) -> str:
    return "unknown" if rate is None else rate_text(rate)
