"""A record as a flat JSON object: what log.jsonl holds a line of, and what goes to the trackers.

JSON has no NaN and no infinity: null stands for what was not measured, the texts "Infinity" and "-Infinity" for the
others. Times of ranks, layers' readings and parameters are in `run.db` alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from operator import attrgetter
from typing import Any

from ddp.telemetry.records import BatchChange, EvaluationRecord, RunEvent, RunInfo, StepRecord

Line = dict[str, Any]
SURROGATES = "backslashreplace"  # of names that are no UTF-8: as JSON writes them
LoggedRecord = StepRecord | EvaluationRecord | BatchChange | RunEvent

STEP_FIELDS = tuple(field.name for field in fields(StepRecord) if field.name not in ("phase_seconds", "noise"))
step_values = attrgetter(*STEP_FIELDS)


def run_line(info: RunInfo) -> Line:
    """What is told first, by each part of a run."""
    return {"kind": "run", **plain(asdict(info))}


def line(record: LoggedRecord) -> Line:
    match record:
        case StepRecord():
            values = dict(zip(STEP_FIELDS, step_values(record), strict=True))
            if (reading := record.reading) is not None:
                values |= {"noise_scale": reading.noise_scale, "noise_scale_low": reading.low}
                values |= {"noise_scale_high": reading.high, "noise_scale_state": reading.state}
            return {"kind": "step", **plain(values)}
        case EvaluationRecord():
            return {"kind": "evaluation", **plain(asdict(record))}
        case BatchChange():
            return {"kind": "batch_change", **plain(asdict(record))}
        case RunEvent():
            values = asdict(record)
            return {"kind": "event", **plain({("event" if key == "kind" else key): values[key] for key in values})}


def encoded(record: LoggedRecord | RunInfo) -> str:
    """As one line of JSON, without the line's end; "" for a record that is none, which must not hold up those behind it."""
    try:
        return text(run_line(record) if isinstance(record, RunInfo) else line(record))
    except (TypeError, ValueError, AttributeError):
        return ""


def text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """With numbers that JSON has, at every depth."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
