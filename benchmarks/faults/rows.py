"""The rows of the table, in its order."""

from __future__ import annotations

from faults import kills, numbers, saving, silences, stops, telemetry_faults
from faults.verdict import Row

ROWS: tuple[Row, ...] = (
    kills.ROW,
    stops.ROW,
    silences.STOPPED,
    silences.CUT,
    saving.CUT_SHORT,
    saving.DAMAGE,
    telemetry_faults.FULL,
    numbers.NOT_FINITE,
    numbers.FLIP,
    telemetry_faults.STRAGGLER,
    telemetry_faults.BLIND,
)
