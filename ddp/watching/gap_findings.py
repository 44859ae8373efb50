"""Training against validation, from evaluations of both: overfitting, a model that is too small, training that goes wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddp.watching.finding import Finding

LARGE_GAP = 0.1  # of accuracies
SMALL_GAP = 0.03
LOW_ACCURACY = 0.8
STILL = 0.01  # how much better an accuracy must get in half of the evaluations, not to stand still
EVALUATIONS = 6  # before a model may be called too small
RISEN = 0.05  # of the loss at the start, and
RISEN_RATIO = 1.2  # times the lowest, in each of the latest
LATEST = 2
TOO_SMALL = "training and validation accuracy stand still, and low"


@dataclass(frozen=True, slots=True)
class Pair:
    """Both splits at one step. Accuracies are shares, NaN where the task has none."""

    step: int
    examples: int  # of each
    training_loss: float
    validation_loss: float
    training_accuracy: float = math.nan
    validation_accuracy: float = math.nan

    @property
    def gap(self) -> float:
        """Training accuracy less validation accuracy."""
        return self.training_accuracy - self.validation_accuracy

    @property
    def error(self) -> float:
        """Standard error of the gap, from the examples it was taken over."""
        accuracies = (self.training_accuracy, self.validation_accuracy)
        return math.sqrt(sum(max(each * (1 - each), 0.0) for each in accuracies) / max(self.examples, 1))


def gap_findings(pairs: Sequence[Pair], start_loss: float) -> list[Finding]:
    """What the evaluations so far show, in order of steps.

    Args:
        start_loss: the training loss before anything was learned, which small losses are held against.
    """
    if len(pairs) < LATEST:
        return []
    return [
        *_large_gap(pairs),
        *_too_small(pairs),
        *_overfitting(pairs, start_loss),
        *_training_rises(pairs, start_loss),
    ]


def _large_gap(pairs: Sequence[Pair]) -> list[Finding]:
    if not all(pair.gap > LARGE_GAP + 2 * pair.error for pair in pairs[-LATEST:]):
        return []
    last = pairs[-1]
    return [
        Finding(
            "large gap between training and validation",
            f"accuracy is {_percent(last.training_accuracy)} in training and {_percent(last.validation_accuracy)} in validation: "
            "the model overfits; regularise (weight decay, dropout, augmentation), or get more data",
        )
    ]


def _too_small(pairs: Sequence[Pair]) -> list[Finding]:
    """Accuracy stands still, low, in both."""
    last = pairs[-1]
    if len(pairs) < EVALUATIONS or not (last.training_accuracy < LOW_ACCURACY and last.gap < SMALL_GAP + last.error):
        return []
    half = len(pairs) // 2
    earlier = max(pair.training_accuracy for pair in pairs[:half])
    later = max(pair.training_accuracy for pair in pairs[half:])
    if not later - earlier < STILL:
        return []
    return [
        Finding(
            TOO_SMALL,
            f"at {_percent(last.training_accuracy)} and {_percent(last.validation_accuracy)}: the model does not fit the training set "
            "either; take a larger one, unless the data leaves no more to learn or the learning rate is off",
        )
    ]


def _overfitting(pairs: Sequence[Pair], start_loss: float) -> list[Finding]:
    best = min(pairs, key=lambda pair: pair.validation_loss)
    last = pairs[-1]
    rises = _risen([pair.validation_loss for pair in pairs], start_loss)
    if not rises or not last.training_loss < best.training_loss:
        return []
    return [
        Finding(
            "validation loss rises while training loss falls",
            f"it was {best.validation_loss:.3g} at step {best.step:,} and is {last.validation_loss:.3g}: the model overfits; stop early, "
            "regularise (weight decay, dropout, augmentation), or get more data",
        )
    ]


def _training_rises(pairs: Sequence[Pair], start_loss: float) -> list[Finding]:
    if not _risen([pair.training_loss for pair in pairs], start_loss):
        return []
    best, last = min(pairs, key=lambda pair: pair.training_loss), pairs[-1]
    return [
        Finding(
            "training error rises",
            f"the loss on the training set was {best.training_loss:.3g} at step {best.step:,} and is {last.training_loss:.3g}: lower the "
            "learning rate, let it decay, or clip the gradient; look for a fault in the data",
        )
    ]


def _risen(losses: Sequence[float], start_loss: float) -> bool:
    """All of the latest lie above the lowest before them, by a share of it and of the loss at the start."""
    earlier, latest = losses[:-LATEST], losses[-LATEST:]
    if not earlier or not start_loss > 0:
        return False
    lowest = min(earlier)
    return all(each > RISEN_RATIO * lowest and each - lowest > RISEN * start_loss for each in latest)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
