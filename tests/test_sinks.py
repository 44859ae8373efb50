"""What one sink raises is said once and costs that sink alone."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence

import pytest

from ddp.telemetry.recorder import Recorder
from ddp.telemetry.records import (
    BatchChange,
    EvaluationRecord,
    LayersRecord,
    ParameterEntries,
    ParametersRecord,
    RunEvent,
    Sink,
    StepRecord,
)
from ddp.telemetry.sinks import Sinks
from telemetry_records import batch_changes, evaluation_records, run_info, step_records

EVENT = RunEvent(3, 1.0, "straggler", 1, "rank 1 is slow")
PARAMETERS = ParametersRecord(3, (ParameterEntries("0.weight", (2, 2), (0, 3), (1.0, 2.0), (0.1, 0.2)),))
Record = StepRecord | EvaluationRecord | BatchChange | RunEvent | LayersRecord | ParametersRecord


class Hearing(Sink):
    """Keeps what it hears; raises at the records that `fails_at` counts, from 1."""

    def __init__(self, fails_at: Sequence[int] = (), error: Exception | None = None) -> None:
        self.heard: list[Record] = []
        self.fails_at, self.error = fails_at, error or RuntimeError("out of order")
        self.calls = self.closed = 0

    def step(self, record: StepRecord) -> None:
        self._hear(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._hear(record)

    def layers(self, record: LayersRecord) -> None:
        self._hear(record)

    def parameters(self, record: ParametersRecord) -> None:
        self._hear(record)

    def batch_change(self, record: BatchChange) -> None:
        self._hear(record)

    def event(self, record: RunEvent) -> None:
        self._hear(record)

    def close(self) -> None:
        self.closed += 1

    def _hear(self, record: Record) -> None:
        self.calls += 1
        if self.calls in self.fails_at:
            raise self.error
        self.heard.append(record)


@pytest.mark.parametrize("kind", [Sinks, Recorder])
def test_no_record_is_left_out(kind: type[Sink]) -> None:
    """By those that take all: a method that `Sink` gains would otherwise go past them without a word."""
    assert {name for name in vars(Sink) if not name.startswith("_")} <= vars(kind).keys()


def _tell(sinks: Sinks) -> list[Record]:
    info = run_info()
    told: list[Record] = [
        *step_records(info, 2),
        evaluation_records(info)[0],
        batch_changes(info)[0],
        EVENT,
        PARAMETERS,
    ]
    for record in told:
        match record:
            case StepRecord():
                sinks.step(record)
            case EvaluationRecord():
                sinks.evaluation(record)
            case BatchChange():
                sinks.batch_change(record)
            case RunEvent():
                sinks.event(record)
            case LayersRecord():
                sinks.layers(record)
            case ParametersRecord():
                sinks.parameters(record)
    return told


def test_all_hear_all_in_order() -> None:
    one, other = Hearing(), Hearing()
    sinks = Sinks([one])
    sinks.add(other)
    told = _tell(sinks)
    sinks.close()
    assert one.heard == other.heard == told
    assert (one.closed, other.closed) == (1, 1)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 6])
def test_one_that_raises_is_dropped_with_one_warning(fails_at: int, caplog: pytest.LogCaptureFixture) -> None:
    before, broken, after = Hearing(), Hearing(range(fails_at, 9)), Hearing()
    told = _tell(Sinks([before, broken, after]))
    assert before.heard == after.heard == told
    assert broken.heard == told[: fails_at - 1]
    assert broken.closed == 1
    (said,) = caplog.messages
    assert said == "Hearing fails and hears no more of the run, training goes on: RuntimeError: out of order"


def test_what_ends_a_process_is_not_held_back() -> None:
    class Ending(Hearing):
        def step(self, record: StepRecord) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Ending()]).step(step_records(run_info(), 1)[0])


def test_a_log_that_cannot_be_written_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """logging itself raises where the stream it says so on is closed too."""
    gone = io.StringIO()
    gone.close()
    handler = logging.StreamHandler(gone)
    logger = logging.getLogger("ddp.telemetry.sinks")
    logger.addHandler(handler)
    monkeypatch.setattr(sys, "stderr", gone)
    try:
        other = Hearing()
        assert _tell(Sinks([Hearing([2]), other])) == other.heard
    finally:
        logger.removeHandler(handler)


def test_one_that_fails_while_it_is_closed_does_not_keep_the_others_open(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Hearing):
        def close(self) -> None:
            raise OSError("no space left on device")

    other = Hearing()
    Sinks([Stuck(), other]).close()
    assert other.closed == 1
    assert "Stuck fails" in caplog.text
