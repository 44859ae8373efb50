"""Watches curves and layers while a run trains, and says once in words what looks wrong and what to do."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ddp.telemetry.records import (
    EvaluationRecord,
    LayersRecord,
    RunEvent,
    RunInfo,
    Sink,
    StepRecord,
)
from ddp.watching.curve_findings import curve_findings
from ddp.watching.finding import Finding, title_of
from ddp.watching.gap_findings import TOO_SMALL, Pair, gap_findings
from ddp.watching.layer_findings import LOOKS, Look, Situation, layer_findings, median_ratio
from ddp.watching.loss_curve import LossCurve

KEPT_PAIRS = 256
FIRST_JUDGED_STEP, JUDGED_AGAIN = 20, 1.25  # the curve is looked at again when it is so much longer
PRESENT = 0.9  # of the curve: from here on it is "now"


class WarningSink(Sink):
    """A `Sink` that tells the others.

    The loss curve goes into checkpoints. Evaluations, and what it has said, come back from the record: see `recall`.
    """

    def __init__(self, info: RunInfo, say: Callable[[RunEvent], None]) -> None:
        self._info, self._say = info, say
        self._curve = LossCurve()
        self._pairs: deque[Pair] = deque(maxlen=KEPT_PAIRS)
        self._training: EvaluationRecord | None = None
        self._looks: deque[tuple[int, Look]] = deque(maxlen=LOOKS)
        self._largest_rate = self._rate_before = 0.0
        self._said: set[str] = set()
        self._last: StepRecord | None = None
        self._judge_at = FIRST_JUDGED_STEP

    def step(self, record: StepRecord) -> None:
        self._last = record
        self._curve.observe(record.step, record.loss)
        if record.step >= self._judge_at:
            self._judge_at = math.ceil(record.step * JUDGED_AGAIN)
            self._tell(curve_findings(self._curve, self._ratio()), record.step, record.unix_time)

    def evaluation(self, record: EvaluationRecord) -> None:
        """The training sample comes before the validation set."""
        if self._take_pair(record):
            self._tell(gap_findings(list(self._pairs), self._curve.start), record.step, record.unix_time)

    def recall(self, evaluations: Iterable[EvaluationRecord], events: Iterable[RunEvent]) -> None:
        """What earlier parts of the run recorded; nothing is said of it again."""
        for event in events:
            self.event(event)
        for record in evaluations:
            self._take_pair(record)

    def _take_pair(self, record: EvaluationRecord) -> bool:
        """Whether `record` and the training sample's before it are of one step."""
        if record.split == "training":
            self._training = record
        training = self._training
        if record.split != "validation" or training is None or training.step != record.step:
            return False
        self._pairs.append(
            Pair(
                *(record.step, record.examples, training.loss, record.loss),
                *(self._accuracy(training), self._accuracy(record)),
            )
        )
        return True

    def layers(self, record: LayersRecord) -> None:
        self._looks.append((record.step, record.layers))
        found = layer_findings([look for _, look in self._looks], self._situation())
        self._tell(found, record.step, record.unix_time)

    def event(self, record: RunEvent) -> None:
        """What was said, in an earlier part of the run too; and what a roll-back makes void."""
        if record.kind == "warning":
            self._said.add(title_of(record.text))
        if record.kind == "rolled_back":
            self._forget_after(record.step)

    def _accuracy(self, record: EvaluationRecord) -> float:
        """The watched metric where it is an accuracy, a share that is better when larger; else NaN."""
        name = self._info.metric if "accuracy" in self._info.metric else "accuracy"
        return record.metrics.get(name, math.nan)

    def _ratio(self) -> float:
        return median_ratio(self._looks[-1][1]) if self._looks else math.nan

    def _situation(self) -> Situation:
        share = self._curve.mean(PRESENT, 1) / self._curve.start if self._curve.start > 0 else math.nan
        if self._last is None:
            return Situation(share)
        rate, before = self._last.learning_rate, self._rate_before
        self._largest_rate, self._rate_before = max(self._largest_rate, rate), rate
        return Situation(share, rate / self._largest_rate if rate > 0 else 1.0, rate > before)

    def _tell(self, findings: list[Finding], step: int, unix_time: float) -> None:
        for finding in findings:
            if finding.title == TOO_SMALL and self._said:
                continue  # what was said before is the likelier cause
            if finding.title not in self._said:
                self._said.add(finding.title)
                self._say(RunEvent(step, unix_time, "warning", -1, finding.sentence))

    def _forget_after(self, step: int) -> None:
        self._curve.forget_after(step)
        self._pairs = deque((pair for pair in self._pairs if pair.step <= step), maxlen=KEPT_PAIRS)
        self._looks = deque((look for look in self._looks if look[0] <= step), maxlen=LOOKS)
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        return self._curve.state_dict()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            KeyError, TypeError, ValueError: it is none that `state_dict` made.
        """
        LossCurve().load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._curve.load_state_dict(state)
