"""The rows of the table, in its order."""

from __future__ import annotations

from faults import kills, stops
from faults.verdict import Row

ROWS: tuple[Row, ...] = (kills.ROW, stops.ROW)
